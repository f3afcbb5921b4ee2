"""DecodeNeurons, FindNeurons and CompareNeuronSets through a real channel, against the weights of the tiny llama."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from secured import until
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2, job_pb2, program_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

NEURONS, LAYERS, WIDTH = 64, 2, 32
VECTOR = torch.linspace(-1, 1, WIDTH)
DECODE, FIND, COMPARE = pb.DecodeNeuronsRequest, pb.FindNeuronsRequest, pb.CompareNeuronSetsRequest
SETS: dict[str, dict[str, Tensor]] = {
    "one": {"layer.0.neurons": torch.tensor([1, 2, 3]), "layer.1.neurons": torch.tensor([5])},
    "two": {"layer.0.neurons": torch.tensor([3]), "layer.1.neurons": torch.tensor([5, 6])},
}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        store, fingerprint = ArtifactStore(server.server.config.artifacts_url), server.model.info.fingerprint
        for tag, tensors in SETS.items():
            store.put(ArtifactKind.NEURON_SET, tensors, model_fingerprint=fingerprint, tags=[tag])
        vectors = {f"layer.{layer}": VECTOR for layer in range(LAYERS)}
        store.put(ArtifactKind.VECTOR, vectors, model_fingerprint=fingerprint, site=Site.RESID_POST, tags=["direction"])
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> NeuronServiceStub:
    return NeuronServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def products(model: PreTrainedModel, layer: int, weights: str = "down") -> Tensor:
    """[neurons, vocab]: rows times the unembedding with the scale of the final norm."""
    mlp = model.model.layers[layer].mlp
    rows = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight.T}[weights]
    return (rows * model.model.norm.weight) @ model.lm_head.weight.T.detach()


def decoded(stub: NeuronServiceStub, request: pb.DecodeNeuronsRequest) -> list[pb.DecodedNeuron]:
    return [neuron for response in stub.DecodeNeurons(request) for neuron in response.decoded.neurons]


def found(stub: NeuronServiceStub, **fields: Any) -> pb.FoundNeurons:
    result: pb.FoundNeurons = list(stub.FindNeurons(FIND(**fields)))[-1].result
    return result


def test_decoded_tokens_are_those_of_an_explicit_product(stub: NeuronServiceStub, model: PreTrainedModel) -> None:
    listed = pb.NeuronIds(neurons=[pb.NeuronId(layer=1, neuron=5), pb.NeuronId(layer=0, neuron=2)])
    neurons = decoded(stub, DECODE(neurons={"neurons": listed}, top_k=4))
    assert [(n.neuron.layer, n.neuron.neuron) for n in neurons] == [(1, 5), (0, 2)]
    for neuron in neurons:
        layer, index = neuron.neuron.layer, neuron.neuron.neuron
        effects = products(model, layer)[index]
        assert [pb.NeuronWeights.Name(row.weights) for row in neuron.rows] == [
            f"NEURON_WEIGHTS_{name}" for name in ("GATE", "UP", "DOWN")
        ]
        for row, name in zip(neuron.rows, ("gate", "up", "down"), strict=True):
            p = products(model, layer, name)[index].double()
            for side, order in ((row.top, p.argsort(descending=True)), (row.bottom, p.argsort())):
                assert [token.id for token in side] == order[:4].tolist()
                assert [token.product for token in side] == pytest.approx(p[order[:4]].tolist(), abs=1e-5)
                assert [token.effect for token in side] == pytest.approx(effects[order[:4]].tolist(), abs=1e-5)
            assert row.top_z == pytest.approx(float((p.max() - p.mean()) / p.std(correction=0)), rel=1e-3)


def test_a_whole_layer_is_decoded_in_order(stub: NeuronServiceStub) -> None:
    neurons = decoded(stub, DECODE(layers=[1], weights=["NEURON_WEIGHTS_DOWN"], top_k=1))
    assert [(n.neuron.layer, n.neuron.neuron) for n in neurons] == [(1, i) for i in range(NEURONS)]


def test_words_are_found_by_what_neurons_write_in_favour_of_them(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    words = ["dog", "cat"]
    result = found(stub, words={"words": words}, top_k=5, value=3.0)
    # A token is a byte, and each word begins with that of a space.
    space = server.model.tokenizer.encode(" d", add_special_tokens=False)[0]
    assert {token.id for token in result.tokens} == {space}
    p = torch.cat([products(model, layer) for layer in range(LAYERS)]).double()
    z = ((p - p.mean(1, keepdim=True)) / p.std(1, correction=0, keepdim=True))[:, space]
    order = z.abs().argsort(descending=True)[:5]
    best = result.found.best
    assert [each.neuron.layer * NEURONS + each.neuron.neuron for each in best] == order.tolist()
    assert [each.score for each in best] == pytest.approx(z.abs()[order].tolist(), rel=1e-3)
    assert [each.value for each in best] == [math.copysign(3.0, z[unit]) for unit in order.tolist()]


def test_a_direction_is_found_by_the_cosine_of_what_neurons_write(
    stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    best = found(stub, vector={"artifact": "direction"}, top_k=4, layers=[1]).found.best
    columns = model.model.layers[1].mlp.down_proj.weight.T.detach().double()
    cosine = torch.nn.functional.cosine_similarity(columns, VECTOR[None].double())
    order = cosine.abs().argsort(descending=True)[:4]
    assert [each.neuron.neuron for each in best] == order.tolist()
    assert [each.score for each in best] == pytest.approx(cosine.abs()[order].tolist(), rel=1e-3)
    assert [each.value > 0 for each in best] == [bool(cosine[unit] > 0) for unit in order.tolist()]


def test_a_found_set_raises_its_word_when_the_next_call_clamps_it(
    server: LiveServer, stub: NeuronServiceStub, channel: grpc.Channel
) -> None:
    found(stub, words={"words": ["dog"]}, layers=[1], top_k=3, tags=["dog"], replace_tags=True)
    generation, prompt = GenerationServiceStub(channel), generation_pb2.Prompt(text="It was a")

    def score(*edits: program_pb2.Edit) -> float:
        request = generation_pb2.ScoreRequest(prompt=prompt, text=" ", program={"edits": edits})
        return float(generation.Score(request).total_logprob)

    clamp = program_pb2.Edit(site="SITE_MLP_POST", neurons={"neuron_set": "dog", "set": {}})
    assert score(clamp) > score() + 0.1


def test_sets_are_compared_by_stated_definitions(stub: NeuronServiceStub) -> None:
    (comparison,) = stub.CompareNeuronSets(COMPARE(neuron_sets=["one", "two"])).comparisons
    assert (comparison.common, comparison.jaccard, comparison.overlap_coefficient) == (2, 2 / 5, 2 / 3)
    # Draws without replacement by layer: 3 * 1 / 64 and 1 * 2 / 64.
    assert comparison.expected_common == pytest.approx(5 / NEURONS)


def test_a_search_can_be_a_job_that_outlives_its_caller(channel: grpc.Channel, stub: NeuronServiceStub) -> None:
    jobs = JobServiceStub(channel)
    request = FIND(words={"words": ["dog"]}, top_k=2)
    job = jobs.StartJob(job_pb2.StartJobRequest(find_neurons=request))
    last = list(jobs.FollowJob(job_pb2.FollowJobRequest(id=job.job.id)))[-1]
    assert last.find_neurons.result.found.best == found(stub, words={"words": ["dog"]}, top_k=2).found.best


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("DecodeNeurons", DECODE(top_k=101), "top_k"),
        ("DecodeNeurons", DECODE(layers=[2]), "layers[0]"),
        ("DecodeNeurons", DECODE(weights=[9]), "weights[0]"),  # type: ignore[list-item]
        ("DecodeNeurons", DECODE(layers=[0], neurons={"neuron_set": "one"}), "layers"),
        ("DecodeNeurons", DECODE(neurons={}), "neurons.source"),
        ("DecodeNeurons", DECODE(neurons={"neurons": {}}), "neurons.neurons.neurons"),
        ("DecodeNeurons", DECODE(neurons={"neurons": {"neurons": [{"layer": 2}]}}), "neurons.neurons.neurons[0].layer"),
        ("DecodeNeurons", DECODE(neurons={"neuron_set": "no"}), "neurons.neuron_set"),
        ("DecodeNeurons", DECODE(neurons={"neuron_set": "one", "top_k": 1}), "neurons.top_k"),
        ("FindNeurons", FIND(), "concept"),
        ("FindNeurons", FIND(words={}), "words.words"),
        ("FindNeurons", FIND(words={"words": ["dog", " "]}), "words.words[1]"),
        ("FindNeurons", FIND(vector={"artifact": "no"}), "vector.artifact"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, layers=[0, 5]), "layers[1]"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, top_k=129), "top_k"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, value=0.0), "value"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, value=math.nan), "value"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, tags=["a/b"]), "tags[0]"),
        ("FindNeurons", FIND(words={"words": ["dog"]}, tags=["one"]), "tags[0]"),
        ("CompareNeuronSets", COMPARE(neuron_sets=["one"]), "neuron_sets"),
        ("CompareNeuronSets", COMPARE(neuron_sets=["one", "no"]), "neuron_sets[1]"),
        ("CompareNeuronSets", COMPARE(neuron_sets=["one", "direction"]), "neuron_sets[1]"),
        ("CompareNeuronSets", COMPARE(neuron_sets=["one", "two"], top_k=1), "top_k"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_field(
    stub: NeuronServiceStub, method: str, request_: Any, field: str
) -> None:
    def answer() -> None:
        answered = getattr(stub, method)(request_)
        if method != "CompareNeuronSets":
            list(answered)

    with pytest.raises(grpc.RpcError) as caught:
        answer()
    assert failure(caught.value).message.startswith(f"{field}: ")


@pytest.mark.parametrize("request_", [DECODE(top_k=100), FIND(words={"words": ["dog"]})], ids=["decode", "find"])
def test_a_cancelled_search_frees_the_exclusive_door(
    server: LiveServer, stub: NeuronServiceStub, request_: Any
) -> None:
    name = "DecodeNeurons" if isinstance(request_, pb.DecodeNeuronsRequest) else "FindNeurons"
    call = getattr(stub, name)(request_)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    until(lambda: not server.server.engine.stats().running)
    assert found(stub, words={"words": ["dog"]}, top_k=1).found.neurons == 1
