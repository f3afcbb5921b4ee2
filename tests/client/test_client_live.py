"""Both clients against a whole server of a tiny random llama (2 layers, width 32, 64 neurons, 4 heads)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.programs import (
    Program,
    add,
    clamp_neurons,
    generated,
    last,
    positions,
    read_logit_lens,
    read_projection,
    role,
    set_neurons,
)
from patchclamp.results import CompareText, Detokenization, Divergence, ExtractionProgress
from patchclamp.streams import Session
from patchclamp_server.model.load import load_model

PUSH = [3.0 if i % 2 else -2.0 for i in range(32)]
PAIRS = [(f"good {word}", f"bad {word}") for word in ("day", "dog", "book", "tea", "idea", "song", "walk", "game")]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One of its own, because these tests store artifacts."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("client_artifacts")) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_the_pieces_of_text_add_up_to_the_result(client: Client):
    stream = client.generate("hello", max_tokens=8, ignore_eos=True)
    pieces = list(stream.text)
    result = stream.result()
    assert "".join(pieces) == result.text
    assert (result.finish_reason, len(result.tokens), result.usage.generated_tokens) == ("length", 8, 8)


def test_a_program_changes_the_tokens_and_its_receipt_reads_well(client: Client):
    plain = client.generate("hello", max_tokens=8, ignore_eos=True).result()
    program = Program([add(np.array(PUSH, np.float32), layers=[1], name="push")])
    edited = client.generate("hello", max_tokens=8, ignore_eos=True, program=program).result()
    assert [t.id for t in edited.tokens] != [t.id for t in plain.tokens]
    assert edited.receipt.touched
    # Five prompt tokens and seven generated ones pass through the model.
    assert "push: 12 token-layer rows" in str(edited.receipt).replace("0 more rows from the prefix cache", "")
    assert str(plain.receipt) == "receipt: no edits"


def test_a_receipt_says_when_nothing_was_touched(client: Client):
    program = [add(PUSH, layers=1, strength=4.0, scope=positions(100, 200))]
    result = client.generate("hello", max_tokens=4, ignore_eos=True, program=program).result()
    assert "NO activation was touched" in str(result.receipt)


def test_roles_of_messages_are_scopes(client: Client):
    program = [set_neurons([3], 1.0, layers=0, scope=role("user"), name="n3")]
    result = client.generate(messages=[("user", "hi")], max_tokens=2, ignore_eos=True, program=program).result()
    roles = client.tokenize(messages=[("user", "hi")]).roles
    assert result.receipt.edits[0].rows == roles.count("user") > 0


def test_logprobs_and_readouts_come_with_their_tokens(client: Client):
    program = Program(readouts=[read_projection([PUSH], layers=[0, 1], name="push")])
    result = client.generate("hello", max_tokens=3, ignore_eos=True, logprobs=2, program=program).result()
    assert all(t.logprob is not None and len(t.top_logprobs) == 2 for t in result.tokens)
    assert {(r.name, r.layer) for r in result.prompt_readouts} == {("push", 0), ("push", 1)}
    assert len(result.prompt_readouts) == 10


def test_what_is_read_as_tokens_is_read_as_words(client: Client):
    program = Program(readouts=[read_logit_lens(2, layers=1)])
    result = client.generate("hello", max_tokens=3, ignore_eos=True, logprobs=2, program=program).result()
    ids = [token.id for token in result.tokens]
    assert tuple(token.text for token in result.tokens) == client.detokenize(ids).pieces
    for token in result.tokens:
        likeliest = [top.id for top in token.top_logprobs]
        assert tuple(top.text for top in token.top_logprobs) == client.detokenize(likeliest).pieces
    for value in result.prompt_readouts:
        assert value.texts == client.detokenize(value.ids).pieces


async def test_both_clients_tell_the_text_of_token_ids(client: Client, server: LiveServer):
    ids = client.tokenize("a é").ids
    async with AsyncClient(server.address) as asynchronous:
        assert await asynchronous.detokenize(ids) == client.detokenize(ids)
    assert client.detokenize(ids) == Detokenization("a é", ("a", " ", "\ufffd", "\ufffd"))
    assert client.detokenize([*ids, 2], skip_special_tokens=True).text == "a é"


def test_a_refusal_names_the_field(client: Client):
    with pytest.raises(PatchclampError) as refused:
        client.generate("hello", program=[add([1.0, 2.0], layers=1)]).result()
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.violations[0].field.startswith("program.edits[0].add.vector")


def test_a_missing_artifact_is_not_found(client: Client):
    with pytest.raises(PatchclampError) as refused:
        client.get_artifact("nothing")
    assert (refused.value.code, refused.value.violations[0].field) == ("NOT_FOUND", "ref")


def test_score_sums_the_log_probabilities(client: Client):
    result = client.score("hello", " you", top_logprobs=1)
    assert result.total_logprob == pytest.approx(sum(t.logprob for t in result.tokens))
    assert result.perplexity == pytest.approx(np.exp(-result.total_logprob / len(result.tokens)))


def test_compare_gives_both_texts_and_a_divergence_for_each_token(client: Client):
    program = [add(PUSH, layers=1)]
    events = []
    result = client.compare("hello", max_tokens=6, ignore_eos=True, program=program).result(events.append)
    assert result.baseline.text == client.generate("hello", max_tokens=6, ignore_eos=True).result().text
    assert len(result.divergences) == result.summary.positions == 6
    assert result.summary.mean_kl > 0
    assert {CompareText, Divergence} <= {type(event) for event in events}


def test_a_session_changes_strength_between_tokens(client: Client):
    program = [add(PUSH, layers=1, strength=0.0, name="push", scope=generated())]
    with client.session("hello", lockstep=True, max_tokens=8, ignore_eos=True, program=program) as session:
        session.advance(3)
        before = tokens_of(session, 3)
        session.set_strength("push", 1.0)
        session.advance(2)
        after = tokens_of(session, 2)
        session.stop()
        result = session.result()
    plain = client.generate("hello", max_tokens=8, ignore_eos=True).result()
    assert before == [token.id for token in plain.tokens[:3]]
    assert before + after == [token.id for token in result.tokens]
    assert result.finish_reason == "client"
    assert result.receipt.touched


def tokens_of(session: Session, count: int) -> list[int]:
    """Ids of the next tokens; one chunk may hold several, or only text."""
    ids: list[int] = []
    while len(ids) < count:
        ids += [token.id for token in next(session).tokens]
    return ids


def test_a_vector_is_extracted_from_texts_by_label_and_from_the_tokens_in_a_scope(client: Client):
    texts = {label: [f"{label} {word}" for word in ("day", "dog", "tea", "song")] for label in ("good", "bad", "odd")}
    found = client.extract_vectors(
        method="linear_discriminant",
        texts=texts,
        target="good",
        contrast="bad",
        pooling="mean",
        scope=last(3),
        layers=[1],
    ).result()
    assert found.artifact.provenance["texts"]["contrast"] == "bad"
    # The last three tokens of eight texts; the third label is not read.
    assert found.layers[0].pooled_tokens + found.layers[0].tokens_left_out == 24
    assert "midpoint" in found.measure


def test_a_task_vector_comes_with_what_it_is_compared_with(client: Client):
    shown = [(letter, letter.upper()) for letter in "abcdefgh"]
    found = client.extract_vectors(method="task_vector", demonstrations=shown, layers=[1]).result()
    assert set(found.baselines) == {"unedited", "demonstrations"}
    assert found.artifact.provenance["method"] == "task_vector"


def test_a_trained_vector_comes_with_its_losses_and_steers(client: Client):
    told: list[object] = []
    found = client.extract_vectors(
        PAIRS, "reft_r1", layers=[1], max_steps=3, batch_size=2, patience=2, tags=["trained"]
    ).result(told.append)
    assert {event.stage for event in told if isinstance(event, ExtractionProgress)} == {
        "training of layer 1",
        "evidence",
    }
    [layer] = found.layers
    assert layer.training is not None
    assert layer.training.steps == 3
    assert layer.training.loss > 0
    assert 0 <= layer.training.difference_auroc <= 1
    assert set(found.baselines) == {"difference_of_means"}
    result = client.generate("hello", program=add("trained", layers=1), max_tokens=2, ignore_eos=True).result()
    assert result.receipt.touched
    assert client.extract_vectors(PAIRS, layers=[1]).result().layers[0].training is None


def test_a_definition_and_words_are_sent_as_they_are_given(client: Client):
    shown = [(f"what {letter} is", letter) for letter in "abcdefgh"]
    found = client.extract_vectors(
        method="definition", demonstrations=shown, definition="what z is", layers=[1]
    ).result()
    assert found.layers[0].random_accuracy == pytest.approx(1 / 2)
    with pytest.raises(PatchclampError, match="one token after a space") as refused:
        client.extract_vectors(method="causal_inner_product", word_pairs=[("king", "queen")] * 3).result()
    assert refused.value.violations[0].field == "word_pairs[0].positive"


def test_an_extracted_vector_is_stored_with_evidence_and_steers(client: Client):
    progress = []
    result = client.extract_vectors(PAIRS, "difference_of_means", tags=["good"], layers=[0, 1]).result(progress.append)
    assert isinstance(progress[0], ExtractionProgress)
    assert [layer.layer for layer in result.layers] == [0, 1]
    assert result.artifact.tags == ("good",)
    program = [add("good", layers=1, strength=3.0)]
    assert client.generate("hello", max_tokens=4, ignore_eos=True, program=program).result().receipt.touched


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_an_artifact_survives_download_and_upload(client: Client, format: str):
    made = client.extract_vectors(PAIRS, layers=[1], tags=[f"gone-{format}"]).result().artifact
    data = client.download_artifact(f"gone-{format}", format)
    back = client.put_artifact(data, format=format, tags=[f"back-{format}"], description="came back")
    assert (back.layers, back.width, back.site) == (made.layers, made.width, made.site)
    # What its tensors are called in the file is told once.
    assert back.imported_from == ({"layer.1": "direction.1"} if format == "gguf" else {})
    assert client.get_artifact(f"back-{format}") == replace(back, imported_from={})


def test_artifacts_are_listed_tagged_and_deleted(client: Client):
    made = client.extract_vectors(PAIRS, "logistic_probe", layers=[0], tags=["first"]).result().artifact
    assert made.id in [artifact.id for artifact in client.list_artifacts("vector")]
    assert set(client.tag_artifact("second", made.id).tags) == {"first", "second"}
    client.untag_artifact("first")
    assert client.get_artifact("second").tags == ("second",)
    client.delete_artifact("second")
    assert made.id not in [artifact.id for artifact in client.list_artifacts()]


def test_models_tokenize_and_health_describe_the_server(client: Client):
    [model] = client.models()
    assert (model.n_layers, model.d_model, model.sites["mlp_post"]) == (2, 32, 64)
    assert "".join(client.tokenize("hello").pieces) == "hello"
    assert client.health() == client.health("patchclamp.v1.GenerationService") == "serving"


def test_results_become_plain_data(client: Client):
    result = client.generate("hello", max_tokens=2, ignore_eos=True).result().to_dict()
    assert result["receipt"]["edits"] == ()
    assert result["tokens"][0]["position"] == 5


async def test_the_async_client_does_the_same(server: LiveServer):
    program = [clamp_neurons([5], max=0.0, layers="all", name="n5")]
    async with AsyncClient(server.address) as client:
        stream = client.generate("hello", max_tokens=6, ignore_eos=True, program=program)
        pieces = [piece async for piece in stream.text]
        result = await stream.result()
        compared = await client.compare("hello", max_tokens=6, ignore_eos=True, program=program).result()
        scored = await client.score("hello", " you")
        made = await client.extract_vectors(PAIRS, layers=[1]).result()
        listed = [artifact.id async for artifact in client.list_artifacts()]
        data = await client.download_artifact(made.artifact.id)
        again = await client.put_artifact(data, tags=["again"])
        assert (await client.tag_artifact("more", again.id)).tags
        await client.untag_artifact("more")
        await client.delete_artifact(again.id)
        assert (await client.models())[0].n_layers == 2
        assert (await client.tokenize("hi")).ids
        assert await client.health() == "serving"
        with pytest.raises(PatchclampError, match="NOT_FOUND"):
            await client.get_artifact("nothing")
    assert "".join(pieces) == result.text == compared.edited.text
    assert len(scored.tokens) == 4
    assert made.artifact.id in listed


async def test_an_async_session_is_stopped_by_the_client(server: LiveServer):
    program = [add(PUSH, layers=1, strength=0.0, name="push")]
    async with (
        AsyncClient(server.address) as client,
        client.session("hello", lockstep=True, max_tokens=8, ignore_eos=True, program=program) as session,
    ):
        await session.advance(2)
        received = 0
        while received < 2:
            received += len((await anext(session)).tokens)
        await session.set_strength("push", 1.0)
        await session.stop()
        result = await session.result()
    assert (result.finish_reason, len(result.tokens)) == ("client", 2)


def test_samples_of_one_prompt_come_in_one_result(live_server: LiveServer):
    with Client(live_server.address) as client:
        first = client.generate("hello", temperature=1.5, seed=3, samples=3, max_tokens=8, ignore_eos=True).result()
        second = client.generate("hello", temperature=1.5, seed=4, max_tokens=8, ignore_eos=True).result()
    assert [sample.seed for sample in (first, *first.others)] == [3, 4, 5]
    assert first.others[0].text == second.text
