"""MatchNeurons through a real channel: checkpoints whose neurons are known to be those of the served model."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from statuses import failure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from patchclamp.v1 import artifact_pb2, generation_pb2, program_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.load import load_model

LAYERS, NEURONS, WINDOW = 2, 64, 48
TEXTS = ["Nobody came that day, and it rained; the key is of red glass. " * 2, "Two and two are four, she said. " * 4]
ORDERS = [torch.randperm(NEURONS, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)]


def changed(source: Path, directory: Path, change: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(directory)
    for file in source.glob("*token*"):
        shutil.copy(file, directory)
    for file in source.glob("*.jinja"):
        shutil.copy(file, directory)
    return directory


def permute(layers: Any) -> None:
    """Neuron j of the copy is neuron ORDERS[layer][j]."""
    for layer, order in zip(layers, ORDERS, strict=True):
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight.copy_(matrix.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def change_layer_1(layers: Any) -> None:
    permute(layers)
    generator = torch.Generator().manual_seed(9)
    for matrix in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
        matrix.weight.copy_(matrix.weight.std() * torch.randn(matrix.weight.shape, generator=generator))


def retokenised(source: Path, directory: Path) -> Path:
    """The same model with a tokenizer of bytes in another order."""
    shutil.copytree(source, directory)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("others")
    (root / "broken").mkdir()
    short = shutil.copytree(tiny_llama_dir, root / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": WINDOW - 1}))
    named = {
        "permuted": changed(tiny_llama_dir, root / "permuted", permute),
        "tuned": changed(tiny_llama_dir, root / "tuned", change_layer_1),
        "foreign": retokenised(tiny_llama_dir, root / "foreign"),
        "broken": root / "broken",
        "short": short,
    }
    match_models = tuple((name, str(path)) for name, path in named.items())
    artifacts = tmp_path_factory.mktemp("artifacts")
    with LiveServer(load_model(str(tiny_llama_dir)), artifacts, match_models=match_models) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> NeuronServiceStub:
    return NeuronServiceStub(channel)


def source(**fields: Any) -> pb.TextSource:
    prompts = [generation_pb2.Prompt(text=text) for text in TEXTS]
    groups = [pb.LabelledTexts(label="texts", prompts=prompts)]
    return pb.TextSource(**{"groups": groups, "window_tokens": WINDOW, **fields})


def listed(*neurons: tuple[int, int]) -> pb.NeuronSelection:
    ids = [pb.NeuronId(layer=layer, neuron=neuron) for layer, neuron in neurons]
    return pb.NeuronSelection(neurons=pb.NeuronIds(neurons=ids))


def run(stub: NeuronServiceStub, other: str, **fields: Any) -> pb.MatchedNeurons:
    responses = list(stub.MatchNeurons(pb.MatchNeuronsRequest(**{"other": other, "texts": source(), **fields})))
    assert responses[-2].progress.done == responses[-2].progress.total
    return responses[-1].result


def pairs(found: pb.MatchedNeurons) -> dict[tuple[int, int], tuple[int, int]]:
    return {(m.neuron.layer, m.neuron.neuron): (m.other.layer, m.other.neuron) for m in found.matches}


def planted(layer: int, neuron: int) -> tuple[int, int]:
    return layer, ORDERS[layer].tolist().index(neuron)


EVERY = {(layer, neuron): planted(layer, neuron) for layer in range(LAYERS) for neuron in range(NEURONS)}


@pytest.mark.parametrize("any_layer", [False, True])
def test_a_permuted_model_is_matched_exactly(stub: NeuronServiceStub, any_layer: bool) -> None:
    found = run(stub, "permuted", any_layer=any_layer)
    assert pairs(found) == EVERY
    assert found.neurons == found.mutual == LAYERS * NEURONS
    assert all(match.mutual for match in found.matches)
    assert found.mean_correlation == pytest.approx(1.0, abs=1e-6)
    assert found.shuffled_mean_correlation < 0.6


@pytest.mark.parametrize("any_layer", [False, True])
def test_chosen_neurons_are_matched_as_among_all(stub: NeuronServiceStub, any_layer: bool) -> None:
    every, chosen = run(stub, "tuned", any_layer=any_layer), [(1, 7), (0, 3), (1, 60), (1, 2), (0, 40)]
    some = run(stub, "tuned", neurons=listed(*chosen), any_layer=any_layer)
    assert some.neurons == len(chosen)
    of_every = {(m.neuron.layer, m.neuron.neuron): m for m in every.matches}
    assert len(some.matches) == len(chosen)
    for match in some.matches:
        same = of_every[match.neuron.layer, match.neuron.neuron]
        assert (match.other, match.mutual) == (same.other, same.mutual)
        assert match.correlation == pytest.approx(same.correlation, abs=1e-6)


def test_a_layer_that_was_changed_is_matched_by_what_numpy_finds(
    server: LiveServer, stub: NeuronServiceStub, tiny_llama_dir: Path
) -> None:
    found = run(stub, "tuned")
    unchanged = {neuron: other for neuron, other in pairs(found).items() if neuron[0] == 0}
    assert unchanged == {neuron: other for neuron, other in EVERY.items() if neuron[0] == 0}
    windows = []
    for text in TEXTS:
        ids = server.model.tokenizer.encode(text, add_special_tokens=False)
        windows += [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    paths = (tiny_llama_dir, Path(dict(server.server.config.match_models)["tuned"]))
    x, y = (rows(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), windows, 1) for path in paths)
    assert found.tokens == len(x)
    r = np.corrcoef(x.T, y.T)[:NEURONS, NEURONS:]
    for match in found.matches:
        i, j = match.neuron.neuron, match.other.neuron
        if match.neuron.layer == 1:
            assert match.correlation == pytest.approx(r[i].max(), abs=1e-4)
            assert j == r[i].argmax()
            assert match.mutual == (r[:, j].argmax() == i)
    assert not all(match.mutual for match in found.matches)
    assert found.shuffled_mean_correlation < found.mean_correlation < 1.0


@torch.no_grad()
def rows(model: PreTrainedModel, windows: list[list[int]], layer: int) -> np.ndarray:
    kept: list[Tensor] = []
    projection = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    projection.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, 1:].double()))
    for ids in windows:
        model(torch.tensor([ids]))
    return torch.cat(kept).numpy()


def test_the_matched_neurons_are_a_set_of_the_other_model(
    server: LiveServer, stub: NeuronServiceStub, channel: grpc.Channel
) -> None:
    found = run(stub, "permuted", neurons=listed((1, 7), (0, 3)), tags=["ported"], description="two")
    artifact = ArtifactServiceStub(channel).GetArtifact(artifact_pb2.GetArtifactRequest(ref="ported")).artifact
    assert artifact.id == found.ported.artifact.id
    other = load_model(dict(server.server.config.match_models)["permuted"])
    assert artifact.model_fingerprint == other.info.fingerprint != server.model.info.fingerprint
    best = {(s.neuron.layer, s.neuron.neuron): s.score for s in found.ported.best}
    assert best == {planted(1, 7): pytest.approx(1.0), planted(0, 3): pytest.approx(1.0)}
    scale = program_pb2.NeuronEdit(neuron_set="ported", scale=program_pb2.NeuronValues(values=[0.0]))
    edit = program_pb2.Edit(site=program_pb2.SITE_MLP_POST, all_layers=True, neurons=scale)
    request = generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text="It was"), program=program_pb2.Program(edits=[edit])
    )
    artifacts = Path(server.server.config.artifacts_url)
    with LiveServer(other, artifacts) as later, grpc.insecure_channel(later.address) as served:
        responses = list(GenerationServiceStub(served).Generate(request))
    assert responses[-1].finished.receipt.edits[0].rows > 0


def test_the_seed_shuffles(stub: NeuronServiceStub) -> None:
    first, again, other = (run(stub, "permuted", layers=[1], seed=seed).shuffled_mean_correlation for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"other": ""}, "INVALID_ARGUMENT", "other"),
        ({"other": "unknown"}, "NOT_FOUND", "other"),
        ({"other": "foreign"}, "FAILED_PRECONDITION", "other"),
        ({"other": "broken"}, "FAILED_PRECONDITION", "other"),
        ({"other": "short"}, "INVALID_ARGUMENT", "texts.window_tokens"),
        ({"texts": None}, "INVALID_ARGUMENT", "texts"),
        ({"texts": source(window_tokens=4)}, "INVALID_ARGUMENT", "texts.window_tokens"),
        ({"neurons": listed((0, 99))}, "INVALID_ARGUMENT", "neurons.neurons.neurons[0].neuron"),
        ({"neurons": listed((0, 1)), "layers": [0]}, "INVALID_ARGUMENT", "layers"),
        ({"layers": [2]}, "INVALID_ARGUMENT", "layers[0]"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_its_field(
    stub: NeuronServiceStub, fields: dict[str, Any], status: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, **{"other": "permuted", **fields})
    refused = failure(caught.value)
    assert refused.code.name == status
    assert refused.message.startswith(f"{field}: ")


def test_what_names_the_flag_tells_no_path(stub: NeuronServiceStub, live_server: LiveServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, "unknown")
    assert "--match-model" in failure(caught.value).message
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, "broken")
    assert "others" not in failure(caught.value).message
    with grpc.insecure_channel(live_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        run(NeuronServiceStub(channel), "permuted")
    refused = failure(caught.value)
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "--match-model NAME=PATH" in refused.message


def decoders_held() -> int:
    gc.collect()
    return sum(type(each) is Decoder for each in gc.get_objects())


def test_the_other_model_is_let_go_of(stub: NeuronServiceStub) -> None:
    before = decoders_held()
    run(stub, "permuted", layers=[1])
    assert decoders_held() == before


def test_a_cancelled_match_leaves_nothing_in_the_engine(server: LiveServer, stub: NeuronServiceStub) -> None:
    before = decoders_held()
    call = stub.MatchNeurons(pb.MatchNeuronsRequest(other="permuted", texts=source(), any_layer=True))
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    # The next job has its turn when this one has ended.
    run(stub, "permuted", layers=[1])
    stats = server.server.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, stats.kv_blocks_total)
    assert decoders_held() == before
