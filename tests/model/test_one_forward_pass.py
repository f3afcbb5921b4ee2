"""Whatever runs the blocks of a model goes through Decoder.run_blocks, and varies it at its seams."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from engine_runs import Job, loaded, run_alone
from kept_sites import KeepSite
from planted_heads import planted_tokenizer
from programs import prompt
from sparse_models import bound, documents, evaluated, sparse_model
from tiny_models import FAMILIES, LAYERS, tiny_model
from torch import Tensor

import patchclamp_server
from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.analysis.heads.attention_mass import attention_mass
from patchclamp_server.analysis.heads.circuits import path_patching
from patchclamp_server.analysis.heads.circuits.attribution import attribute
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair, run_pair, variant_ends
from patchclamp_server.analysis.heads.scores.ordinals import TokenSequence
from patchclamp_server.analysis.heads.scores.successor import OvCircuit
from patchclamp_server.analysis.neurons.gradients import site_gradients
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference
from patchclamp_server.analysis.sparsity.teal_allocation import greedy_path
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.sparse.mlp import SparseMlp
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.engine.request import SparseInference
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.range_check import warn_of_overflow
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.sparsity.mlp import MlpInput, mlp_weights
from patchclamp_server.sparsity.policies import POLICIES

TOKENS = 14
WHOLE = range(LAYERS)
PAIR = CleanCorruptPair(tuple(range(5, 5 + TOKENS)), tuple(range(6, 6 + TOKENS)), 5, 9)


def decoder() -> Decoder:
    return loaded("llama").decoder


def tokens() -> Tensor:
    return documents(2, TOKENS, seed=3)


def test_no_class_of_the_server_is_a_decoder_or_a_product_of_its_own() -> None:
    for module in pkgutil.walk_packages(patchclamp_server.__path__, "patchclamp_server."):
        importlib.import_module(module.name)
    for kind in (Decoder, Linear):
        assert [c for c in kind.__subclasses__() if c.__module__.startswith("patchclamp_server.")] == []


@dataclass
class Record:
    """What ran: the layers of each run of blocks, and by name the pieces of a block that ran outside of one."""

    runs: list[range] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    decoders_made: int = 0
    depth: int = 0


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    seen = Record()
    blocks = [block for model in (decoder(), sparse_model("llama").decoder) for block in model.blocks]
    products = {id(p) for b in blocks for p in (b.qkv, b.attn_output, b.mlp_input, b.mlp_output)}
    make, multiply = Decoder.__init__, Linear.__call__

    def piece(name: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(self: Decoder, *args: Any, **options: Any) -> Tensor:
            if not seen.depth and name == "run_blocks":
                seen.runs.append(args[1])
            elif not seen.depth:
                seen.pieces.append(name)
            seen.depth += 1
            try:
                return method(self, *args, **options)
            finally:
                seen.depth -= 1

        return recorded

    def made(self: Decoder, *args: Any) -> None:
        seen.decoders_made += 1
        make(self, *args)

    def multiplied(self: Linear, x: Tensor) -> Tensor:
        if not seen.depth and id(self) in products:
            seen.pieces.append("product")
        return multiply(self, x)

    for name in ("run_blocks", "attention_output", "mlp"):
        monkeypatch.setattr(Decoder, name, piece(name, getattr(Decoder, name)))
    monkeypatch.setattr(Decoder, "__init__", made)
    monkeypatch.setattr(Linear, "__call__", multiplied)
    return seen


def _mass() -> None:
    at_once(attention_mass(decoder(), tokens()[0], torch.zeros(1, 1, dtype=torch.int64)))


def _attribution() -> None:
    at_once(attribute(decoder(), tokens()[0].tolist(), 5))


def _variants_from_layer_one() -> None:
    runs = at_once(run_pair(decoder(), PAIR))
    replaced = torch.zeros(2, LAYERS, decoder().spec.n_heads, dtype=torch.bool)
    replaced[:, 1:] = True
    at_once(variant_ends(decoder(), runs.clean, replaced, runs.corrupt.z))


def _path_patching() -> None:
    runs = at_once(run_pair(decoder(), PAIR))
    for batch in path_patching.changes(decoder(), runs, runs.corrupt.z):
        at_once(batch)


def _successor() -> None:
    OvCircuit(decoder(), [TokenSequence("three tokens", ((3, 4), (4, 5)), (3, 4, 5))])


def _gradients() -> None:
    at_once(site_gradients(decoder(), Example(tuple(tokens()[0].tolist()), LogitDifference(5))))


def _greedy_path() -> None:
    states = torch.randn(TOKENS, decoder().spec.d_model)
    grids = [torch.linspace(0, 1, 1001)] * 4
    assert len(at_once(greedy_path(sparse_model("llama"), 1, states, 1, grids))) > 1


def _quality() -> None:
    """Griffin observes the prompt, so that its pass is a chunk of its own."""
    evaluated(tokens(), 4, bound(POLICIES["griffin"]()))


def _request() -> None:
    run_alone("llama", Job(prompt("one pass", 8), max_tokens=3), EngineConfig(kv_cache_tokens=256))


def _sparse_request() -> None:
    sparsity = SparseInference("griffin", bound(POLICIES["griffin"]()))
    run_alone("llama", Job(prompt("one pass", 8), max_tokens=3, sparsity=sparsity), EngineConfig(kv_cache_tokens=256))


# What a caller runs: whole passes, passes of some layers, and pieces of blocks.
CALLERS: dict[Callable[[], None], tuple[int, list[range], list[str]]] = {
    _mass: (1, [], []),
    _attribution: (2, [], []),
    _variants_from_layer_one: (2, [range(1, LAYERS)], []),
    _path_patching: (2, [], ["attention_output"] * LAYERS),
    _successor: (0, [], ["mlp"]),
    _gradients: (1, [range(layer, layer + 1) for layer in reversed(WHOLE)], []),
    _request: (3, [], []),
    _sparse_request: (3, [], []),
}


def test_an_evaluation_runs_blocks_by_the_one_function(record: Record) -> None:
    """How many passes it takes depends on time: analysis has as many rows of a step as the pace allows."""
    _quality()
    assert len(record.runs) >= 3
    assert record.runs == [WHOLE] * len(record.runs)
    assert record.pieces == []
    assert record.decoders_made == 0


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
def test_every_caller_runs_blocks_by_the_one_function(caller: Callable[[], None], record: Record) -> None:
    caller()
    whole, parts, pieces = CALLERS[caller]
    assert record.runs == [WHOLE] * whole + parts
    assert record.pieces == pieces
    assert record.decoders_made == 0


def test_the_greedy_path_of_a_block_runs_that_block_alone(record: Record) -> None:
    _greedy_path()
    assert set(record.runs) == {range(1, 2)}
    assert record.pieces == []
    assert record.decoders_made == 0


def test_the_range_of_a_model_is_checked_by_one_pass(record: Record) -> None:
    narrow = decoder_from_transformers(tiny_model("llama"), dtype=torch.float16, device="cpu")
    record.decoders_made = 0
    warn_of_overflow(narrow, planted_tokenizer())
    assert record.runs == [WHOLE]
    assert record.decoders_made == 0


class Visits:
    visited = None

    def __init__(self) -> None:
        self.seen: list[tuple[Site, int, Tensor]] = []

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        self.seen.append((site, layer, x.clone()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [1, 2])
def test_blocks_run_in_parts_visit_and_give_what_they_do_in_one_run(family: str, cut: int) -> None:
    model, documents = loaded(family).decoder, tokens()
    step = inputs_of(documents, 0, TOKENS, model)
    whole, parts = Visits(), Visits()
    expected = model.forward(step, pools_for(model, documents), whole)
    x = model.embed(step.token_ids, step.positions)
    for layers in (range(cut), range(cut, LAYERS)):
        x = model.run_blocks(x, layers, step, pools_for(model, documents, layers), parts)
    assert torch.equal(x, expected)
    for ours, theirs in zip(parts.seen, whole.seen, strict=True):
        assert ours[:2] == theirs[:2]
        assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, TOKENS])
def test_gates_and_ups_are_taken_apart_where_that_is_asked_for_and_no_bit_changes(family: str, rows: int) -> None:
    model, documents = loaded(family).decoder, tokens()[:1, :rows]
    plain, looked = Visits(), Visits()
    step = inputs_of(documents, 0, rows, model)
    expected = model.forward(step, pools_for(model, documents), plain)
    asked = replace(step, visited_preactivations={(site, 1): True for site in PREACTIVATION_SITES})
    assert torch.equal(model.forward(asked, pools_for(model, documents), looked), expected)
    own = [site for site in PREACTIVATION_SITES if site in model.spec.sites]
    assert {place[:2] for place in looked.seen} - {place[:2] for place in plain.seen} == {(site, 1) for site in own}
    assert not {site for site, _, _ in plain.seen} & set(own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neurons_that_policies_see_are_those_of_the_decoder_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    model = decoder_from_transformers(tiny_model(family), dtype=dtype, device="cpu")
    neurons = KeepSite(Site.MLP_POST)
    h = torch.randn(3, model.spec.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.mlp(1, h, neurons)
    block = model.blocks[1]
    seen = MlpInput(h, mlp_weights(block, model.spec), hidden=block.mlp_input(h))
    assert torch.equal(seen.neurons, neurons.kept[1])
    sparse = SparseMlp(block.mlp_input, block.mlp_output, model.spec.activation, gated=model.spec.family.gated)
    assert torch.equal(sparse.dense_neurons(h), neurons.kept[1])
