"""What ExtractVectors takes besides pairs, through a real channel: equal to hidden states of plain transformers."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from steering_fixtures import Live, plain_states
from test_steering_service import events_of, extraction, pair, refused
from tiny_llama import byte_tokenizer

from patchclamp.v1 import artifact_pb2, generation_pb2, neuron_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp_server.analysis.corpora.windows import ListedCorpus
from patchclamp_server.analysis.steering.definition import DefinitionPrompts
from patchclamp_server.analysis.steering.demonstrations import Demonstration
from patchclamp_server.analysis.steering.mean_centred import LABEL, BesideOrdinaryText
from patchclamp_server.analysis.steering.task_vector import TaskPrompts
from patchclamp_server.artifacts.corpora import Document
from patchclamp_server.artifacts.formats import safetensors
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

LAST = program_pb2.Scope(include=[program_pb2.TokenSelector(last_k=1)])
TASK = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("i", "j"), ("k", "l")]


def request_for(method: str, **fields: object) -> pb.ExtractVectorsRequest:
    number = pb.ExtractionMethod.Value(f"EXTRACTION_METHOD_{method.upper()}")
    return pb.ExtractVectorsRequest(method=number, **fields)  # type: ignore[arg-type]


def texts(**labels: list[str]) -> neuron_pb2.TextSource:
    prompt = generation_pb2.Prompt
    groups = [
        neuron_pb2.LabelledTexts(label=label, prompts=[prompt(text=each) for each in own])
        for label, own in labels.items()
    ]
    return neuron_pb2.TextSource(groups=groups)


def demonstrations() -> list[pb.Demonstration]:
    return [pb.Demonstration(input=a, output=b) for a, b in TASK]


async def vector_of(live: Live, result: pb.ExtractionResult, layer: int) -> torch.Tensor:
    asked = artifact_pb2.DownloadRequest(ref=result.artifact.id, format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS)
    data = b"".join([part.chunk async for part in ArtifactServiceStub(live.channel).Download(asked)])
    return safetensors.decode(data).tensors[f"layer.{layer}"]


def encoded(model: LoadedModel) -> Callable[[str, str], tuple[int, ...]]:
    encoder = PromptEncoder(model.tokenizer, model.info)
    return lambda text, field: encoder.encode_text(text).ids


@pytest.mark.parametrize("contrast", ["sad", ""])
async def test_the_vector_of_texts_is_the_difference_of_the_states_of_their_labels(
    live: Live, tiny_llama: LoadedModel, tiny_llama_dir: Path, contrast: str
) -> None:
    """All texts of a label are the same, so that it does not matter which are held out."""
    own = {"joy": ["what a day!"] * 4, "sad": ["oh no?"] * 5, **({"other": ["z"] * 4} if contrast else {})}
    request = request_for("difference_of_means", texts=texts(**own), target="joy", contrast=contrast)
    request.pooling = pb.TOKEN_POOLING_MEAN
    result = (await events_of(live, request))[-1].result
    encode = encoded(tiny_llama)
    positive, negative = (
        plain_states(tiny_llama_dir, encode(text, ""), Site.RESID_POST)[:, 1:].mean(1)
        for text in ("what a day!", "oh no?")
    )
    torch.testing.assert_close(await vector_of(live, result, 1), positive[1] - negative[1], rtol=1e-4, atol=1e-5)
    assert [layer.heldout_accuracy for layer in result.layers] == [1.0, 1.0]
    provenance = MessageToDict(result.artifact.provenance)
    assert provenance["texts"]["target"] == "joy"
    assert (provenance["texts"]["positives"], provenance["texts"]["negatives"]) == (4, 5)
    assert MessageToDict(result.artifact.evidence)["heldout_negatives"] == 2
    assert result.measure


async def test_a_scope_chooses_the_tokens_that_are_pooled(live: Live, tiny_llama_dir: Path) -> None:
    """Of a chat, the turn of the user alone; the header of the answer, which is in every prompt, is not in the mean."""
    chats = [
        generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content=content)])
        for content in ("good day", "go away")
    ]
    positive, negative = (generation_pb2.Prompt(chat=chat) for chat in chats)
    request = request_for("difference_of_means", pairs=[pb.ContrastPair(positive=positive, negative=negative)] * 4)
    request.pooling = pb.TOKEN_POOLING_MEAN
    request.scope.include.add(role="user")
    result = (await events_of(live, request))[-1].result
    means = []
    for content in ("good day", "go away"):
        turn = f"<|im_start|>user\n{content}<|im_end|>\n"
        rendered = byte_tokenizer()(turn + "<|im_start|>assistant\n")["input_ids"]
        n = len(byte_tokenizer()(turn)["input_ids"])
        means.append(plain_states(tiny_llama_dir, tuple(rendered), Site.RESID_POST)[:, 1:n].mean(1))
    torch.testing.assert_close(await vector_of(live, result, 0), means[0][0] - means[1][0], rtol=1e-4, atol=1e-5)
    assert MessageToDict(result.artifact.provenance)["parameters"]["scope"] == {"include": [{"role": "user"}]}


async def test_the_positives_of_mean_centring_are_beside_ordinary_text(live: Live) -> None:
    source = texts(
        shouts=[f"{word.upper()}! {word.upper()}!" for word in ("run", "stop", "go", "help", "fire", "look")]
    )
    result = (await events_of(live, request_for("mean_centred", texts=source)))[-1].result
    provenance = MessageToDict(result.artifact.provenance)["texts"]
    assert (provenance["target"], provenance["positives"], provenance["negatives"]) == ("shouts", 6, 6)
    # They all end with the same letter.
    assert result.layers[0].heldout_accuracy >= 0.75


def test_ordinary_text_comes_in_pieces_as_long_as_the_texts(tiny_llama: LoadedModel) -> None:
    prompts = PromptEncoder(tiny_llama.tokenizer, tiny_llama.info)
    corpus = ListedCorpus([Document("abc", 1), Document("no", 0), Document("x" * 90, 1)], ("other", "own"))
    found = BesideOrdinaryText(corpus, 1, prompts, 64)
    assert found.labels == ("own", LABEL)
    assert found.document_labels.tolist() == [0, 1, 0, 1]
    documents = [found.document(i).text for i in range(4)]
    assert (documents[0], documents[2]) == ("abc", "x" * 90)
    # A longer text is cut into windows.
    assert [len(documents[1]), len(documents[3])] == [3, 64]
    assert documents[3][:3] != documents[1]


async def test_a_task_vector_is_the_mean_state_of_the_last_tokens_of_its_prompts(
    live: Live, tiny_llama: LoadedModel, tiny_llama_dir: Path
) -> None:
    request = request_for("task_vector", demonstrations=demonstrations(), seed=3, holdout_fraction=0.5)
    *progress, last = await events_of(live, request)
    assert {event.progress.stage for event in progress} == {"activations", "evidence"}
    encode = encoded(tiny_llama)
    task = [Demonstration(*each) for each in TASK]
    prompts = TaskPrompts.of(task, 0.5, 3, encode, encode)
    states = [plain_states(tiny_llama_dir, tokens, Site.RESID_POST)[1, -1] for tokens in prompts.demonstrated]
    torch.testing.assert_close(await vector_of(live, last.result, 1), torch.stack(states).mean(0), rtol=1e-4, atol=1e-5)
    assert set(last.result.baselines) == {"unedited", "demonstrations"}
    card = MessageToDict(last.result.artifact.evidence)
    assert (card["training_demonstrations"], card["heldout_demonstrations"]) == (3, 3)
    # It is of no two sides, and has no threshold that a gate could take.
    assert card["layers"][0]["midpoint"] is None


async def test_a_definition_vector_is_the_state_of_its_last_token(
    live: Live, tiny_llama: LoadedModel, tiny_llama_dir: Path
) -> None:
    request = request_for("definition", demonstrations=demonstrations(), definition="z", holdout_fraction=0.5)
    result = (await events_of(live, request))[-1].result
    task = [Demonstration(*each) for each in TASK]
    prompts = DefinitionPrompts.of(task, "z", 0.5, 0, encoded(tiny_llama))
    state = plain_states(tiny_llama_dir, prompts.defined, Site.RESID_POST)[0, -1]
    torch.testing.assert_close(await vector_of(live, result, 0), state, rtol=1e-4, atol=1e-5)
    assert [layer.random_accuracy for layer in result.layers] == pytest.approx([1 / 3] * 2)
    assert set(result.baselines) == {"without_demonstrations"}
    assert MessageToDict(result.artifact.provenance)["definition"] == "z"


def _words(*pairs: tuple[str, str]) -> list[pb.WordPair]:
    return [pb.WordPair(positive=a, negative=b) for a, b in pairs]


def _changed(request: pb.ExtractVectorsRequest, **fields: object) -> pb.ExtractVectorsRequest:
    request.MergeFrom(pb.ExtractVectorsRequest(**fields))  # type: ignore[arg-type]
    return request


def _labelled() -> neuron_pb2.TextSource:
    return texts(a=["aa"] * 4, b=["bb"] * 4)


REFUSED = {
    "pairs and texts": (extraction(texts=_labelled(), target="a"), "texts"),
    "texts for a method of pairs": (request_for("pca_of_differences", texts=_labelled(), target="a"), "texts"),
    "pairs for a method of texts": (request_for("mean_centred", pairs=[pair("a", "b")] * 4), "pairs"),
    "texts that are missing": (request_for("mean_centred"), "texts"),
    "a target of pairs": (extraction(target="a"), "target"),
    "a contrast of ordinary text": (
        request_for("mean_centred", texts=_labelled(), target="a", contrast="b"),
        "contrast",
    ),
    "an unknown target": (request_for("linear_discriminant", texts=_labelled(), target="c"), "target"),
    "no target": (request_for("linear_discriminant", texts=_labelled()), "target"),
    "a contrast with itself": (
        request_for("linear_discriminant", texts=_labelled(), target="a", contrast="a"),
        "contrast",
    ),
    "too few texts": (request_for("logistic_probe", texts=texts(a=["aa"] * 4, b=["bb"] * 2), target="a"), "texts"),
    "texts without a source": (
        request_for("logistic_probe", texts=neuron_pb2.TextSource(), target="a"),
        "texts.groups",
    ),
    "demonstrations for pairs": (extraction(demonstrations=demonstrations()), "demonstrations"),
    "too few demonstrations": (request_for("task_vector", demonstrations=demonstrations()[:2]), "demonstrations"),
    "an empty output": (
        request_for("task_vector", demonstrations=[*demonstrations(), pb.Demonstration(input="x")]),
        "demonstrations[6].output",
    ),
    "a definition for a task": (
        request_for("task_vector", demonstrations=demonstrations(), definition="z"),
        "definition",
    ),
    "a definition that is missing": (request_for("definition", demonstrations=demonstrations()), "definition"),
    "a pooling of a task": (
        request_for("task_vector", demonstrations=demonstrations(), pooling=pb.TOKEN_POOLING_MEAN),
        "pooling",
    ),
    "a scope of a task": (request_for("task_vector", demonstrations=demonstrations(), scope=LAST), "scope"),
    "words of several tokens": (
        request_for("causal_inner_product", word_pairs=_words(("king", "queen"), ("a", "b"), ("c", "d"))),
        "word_pairs[0].positive",
    ),
    "too few words": (request_for("causal_inner_product", word_pairs=_words(("king", "queen"))), "word_pairs"),
    "a scope without a token": (
        extraction(scope={"include": [{"positions": {"start": 200}}]}),
        "scope",
    ),
    "a scope of roles in texts": (
        request_for("logistic_probe", texts=_labelled(), target="a", scope={"include": [{"role": "user"}]}),
        "scope.include[0].role",
    ),
    "a scope that a text is too short for": (
        request_for("logistic_probe", texts=_labelled(), target="a", scope={"include": [{"positions": {"start": 9}}]}),
        "scope",
    ),
    "demonstrations longer than the context": (
        request_for("task_vector", demonstrations=[*demonstrations(), pb.Demonstration(input="x" * 300, output="y")]),
        "demonstrations[",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_the_wrong_input_is_refused_by_field(live: Live, name: str) -> None:
    request, field = REFUSED[name]
    code, fields = await refused(live, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(fields) == 1
    assert fields[0] == field or (field.endswith("[") and fields[0].startswith(field)), fields


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (request_for("linear_discriminant", texts=_labelled()), "required: a label of the texts; they have a, b"),
        (
            request_for("linear_discriminant", texts=_labelled(), target="c"),
            "'c' is no label of the texts; they have a, b",
        ),
        (extraction(demonstrations=demonstrations()), "demonstrations are of task_vector, definition"),
        (extraction(word_pairs=_words(("king", "queen"))), "word_pairs are of causal_inner_product"),
    ],
)
async def test_a_refusal_says_what_would_be_accepted(live: Live, request_: pb.ExtractVectorsRequest, told: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events_of(live, request_)
    assert told in (error.value.details() or "")
