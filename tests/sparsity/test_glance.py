"""Glance in compiled blocks against its meaning written down in torch, row by row, and against the loop in Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from queue import Queue
from typing import Any

import pytest
import torch
from coded_models import coded
from engine_runs import loaded, started
from patience import PATIENCE_SECONDS
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.stored import Format
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.executors.sparse_decoder import SparseBlocks, gathered_products
from patchclamp_server.engine.request import Event, Failed, Finished, Request, SparseInference, StopParams
from patchclamp_server.model.compiled.job import Stage
from patchclamp_server.model.decoder import Block, Decoder, SiteHooks
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.sparsity.apply import Rows
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.glance import Glance
from patchclamp_server.sparsity.policy import Selector

FAMILIES = ["llama", "gemma2", "gpt_neox"]
PROMPT, D_FF = 9, 96
FOUR, FIVE = Format.Q4_1, Format.Q5_0


@cache
def model_of(family: str = "llama", output: Format = FOUR, inputs: Format = FOUR) -> SparseModel:
    plain = decoder_from_transformers(
        tiny_model(family, hidden_size=64, intermediate_size=D_FF), dtype=torch.float32, device="cpu"
    )
    blocks = [
        replace(block, mlp_input=coded(block.mlp_input, inputs), mlp_output=coded(block.mlp_output, output))
        for block in plain.blocks
    ]
    decoder = Decoder(
        plain.spec, plain.embedding, plain.position_embedding, plain.rotary, blocks, plain.final_norm, plain.unembedding
    )
    return SparseModel("coded", decoder)


def glance(model: SparseModel, keep: float = 0.4, **options: int) -> Selector:
    selector = Glance(keep_ratio=keep, **options).bind(model)
    selector.prepare()
    return selector


def rounded(x: Tensor) -> Tensor:
    groups = x.view(len(x), -1, 32)
    step = groups.abs().amax(2, keepdim=True) / 127
    return ((groups / torch.where(step == 0, 1.0, step)).round() * step).view(x.shape)


@dataclass(eq=False)
class Naive:
    """The products of a block where `keep` neurons of some rows are kept, with those forced there."""

    block: Block
    rows: dict[int, list[int]]
    keep: int
    kept: dict[int, list[int]] = field(default_factory=dict)

    def qkv(self, x: Tensor) -> Tensor:
        return self.block.qkv(x)

    def attn_output(self, x: Tensor) -> Tensor:
        return self.block.attn_output(x)

    def mlp_input(self, x: Tensor) -> Tensor:
        y = self.block.mlp_input(x)
        for row in self.rows:
            y[row] = _product(self.block.mlp_input, rounded(x[row : row + 1]))[0]
        return y

    def mlp_output(self, h: Tensor) -> Tensor:
        y = self.block.mlp_output(h)
        norms = self.block.mlp_output.dense().norm(dim=0)
        for row, forced in self.rows.items():
            self.kept[row] = sorted({*(h[row].abs() * norms).topk(self.keep).indices.tolist(), *forced})
            own = torch.zeros_like(h[row : row + 1])
            own[0, self.kept[row]] = h[row, self.kept[row]]
            y[row] = _product(self.block.mlp_output, rounded(own))[0]
        return y


def _product(linear: Linear, x: Tensor) -> Tensor:
    y = (x.double() @ linear.dense().double().T).float()
    return y if linear.bias is None else y + linear.bias


def tokens(n: int) -> Tensor:
    return torch.randint(3, 90, (n, PROMPT + 1), generator=torch.Generator().manual_seed(5))


def step(
    model: SparseModel,
    documents: Tensor,
    rows: Sequence[Rows],
    *,
    python: bool = False,
    hooks: SiteHooks | None = None,
    naive: Sequence[Naive] | None = None,
) -> Tensor:
    """Residual states of a token of each document, after a dense prompt."""
    decoder, pools = model.decoder, pools_for(model.decoder, documents)
    decoder.forward(inputs_of(documents, 0, PROMPT, decoder), pools)
    inputs = inputs_of(documents, PROMPT, PROMPT + 1, decoder)
    given: dict[str, Any] = {} if hooks is None else {"hooks": hooks}
    if naive is not None:
        return decoder.forward(inputs, pools, products=naive, **given)
    blocks = SparseBlocks(model, gathered_products)
    for part in rows:
        blocks.prepare(part.selector)
    if python:
        return decoder.forward(inputs, pools, products=blocks.follow(rows), **given)
    found = blocks.glance(rows, len(documents), frozenset() if hooks is None else hooks.visited)
    assert found is not None
    x = decoder.forward(replace(inputs, sparse=found.rows), pools, **given)
    found.count()
    return x


def row(i: int, selector: Selector, **forced: Tensor | None) -> Rows:
    """A row; l1=… are neurons forced at layer 1."""
    by_layer = {int(name[1:]): neurons for name, neurons in forced.items()}
    return Rows(slice(i, i + 1), selector, selector.begin(), forced=by_layer)


@pytest.mark.parametrize("output", [FOUR, FIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_the_formula_says_among_dense_rows(family: str, output: Format) -> None:
    model, documents = model_of(family, output), tokens(4)
    selector = glance(model)
    rows = [row(0, selector), row(2, selector, l1=torch.tensor([3, 50])), row(3, selector)]
    keep = round(0.4 * D_FF)
    naive = [
        Naive(block, {0: [], 2: [3, 50] if layer == 1 else [], 3: []}, keep)
        for layer, block in enumerate(model.decoder.blocks)
    ]
    expected = model.decoder.logits(step(model, documents, [], naive=naive))
    own = model.decoder.logits(step(model, documents, rows))
    assert (own - expected).abs().max() <= 1e-4 * expected.abs().max()
    for i, part in zip((0, 2, 3), rows, strict=True):
        kept = {layer: len(each.kept[i]) / D_FF for layer, each in enumerate(naive)}
        assert part.state.dropped() == pytest.approx({layer: 1 - share for layer, share in kept.items()})


@pytest.mark.parametrize("inputs", [FOUR, Format.Q4_0, FIVE])
@pytest.mark.parametrize("output", [FOUR, FIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_in_python_gives_the_same_bits(family: str, output: Format, inputs: Format) -> None:
    model, documents = model_of(family, output, inputs), tokens(3)
    selector = glance(model)
    rows = [row(0, selector), row(2, selector, l0=torch.tensor([7]), l1=None)]
    assert torch.equal(step(model, documents, rows), step(model, documents, rows, python=True))


def test_a_row_keeps_its_bits_whoever_is_beside_it_and_so_do_dense_neighbours() -> None:
    model, documents = model_of(), tokens(8)
    selector, other = glance(model), glance(model, 0.2)
    together = step(model, documents, [row(i, selector if i % 2 else other) for i in range(1, 8)])
    dense = model.decoder.forward
    alone = step(model, documents[3:4], [row(0, selector)])
    assert torch.equal(together[3], alone[0])
    pools = pools_for(model.decoder, documents)
    dense(inputs_of(documents, 0, PROMPT, model.decoder), pools)
    plain = dense(inputs_of(documents, PROMPT, PROMPT + 1, model.decoder), pools)
    assert torch.equal(together[0], plain[0])


def test_threads_change_no_bit() -> None:
    model, documents = model_of(), tokens(3)
    rows = [row(i, glance(model)) for i in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(step(model, documents, rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_layers_that_keep_everything_are_those_of_the_dense_model() -> None:
    model, documents = model_of(), tokens(2)
    selector = glance(model, 0.0, first_layer=len(model.decoder.blocks))
    own = step(model, documents, [row(0, selector), row(1, glance(model, 1.0))])
    assert torch.equal(own, step(model, documents, [], naive=[Naive(block, {}, 0) for block in model.decoder.blocks]))


def test_rows_that_ask_for_it_see_the_vocabulary_by_a_preview() -> None:
    plain = decoder_from_transformers(
        tiny_model("llama", hidden_size=64, intermediate_size=D_FF, vocab_size=2064), dtype=torch.float32, device="cpu"
    )
    unembedding = coded(plain.unembedding, Format.Q8_0)
    decoder = Decoder(plain.spec, plain.embedding, None, plain.rotary, plain.blocks, plain.final_norm, unembedding)
    assert decoder.compiled is not None
    decoder.compiled.round_unembedding()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    exact, seen = decoder.logits(x), decoder.logits(x, rounded=True)
    largest = exact.topk(8, dim=1).indices
    assert torch.equal(seen.gather(1, largest), exact.gather(1, largest))
    assert not torch.equal(seen, exact)
    assert (seen - exact).std() < 0.15 * exact.std()
    assert torch.equal(decoder.logits(x), exact)


@dataclass(eq=False)
class Sets:
    """Hooks that set a neuron of every row, and see what there was."""

    site: Site
    seen: list[Tensor] = field(default_factory=list)

    @property
    def visited(self) -> frozenset[tuple[Site, int]]:
        return frozenset({(self.site, 1)})

    def visit(self, site: Site, layer: int, x: Tensor, /) -> None:
        if (site, layer) in self.visited:
            self.seen.append(x.clone())
            x[:, 11] = 4.0


def test_an_edit_of_a_forced_neuron_comes_after_the_choice() -> None:
    model, documents = model_of(), tokens(2)
    selector, forced = glance(model, 0.25), torch.tensor([11])
    hooks, again = Sets(Site.MLP_POST), Sets(Site.MLP_POST)
    own = step(model, documents, [row(0, selector, l1=forced)], hooks=hooks)
    python = step(model, documents, [row(0, selector, l1=forced)], hooks=again, python=True)
    assert torch.equal(own, python)
    assert torch.equal(hooks.seen[0][1], again.seen[0][1])
    assert int((hooks.seen[0][0] != 0).sum()) in (24, 25)
    assert hooks.seen[0][0, 11] != 0


@pytest.mark.parametrize("site", [Site.MLP_GATE, Site.MLP_UP])
def test_steps_that_edit_gates_are_left_to_the_loop_in_python(site: Site) -> None:
    model = model_of()
    selector = glance(model)
    blocks = SparseBlocks(model, gathered_products)
    blocks.prepare(selector)
    assert blocks.glance([row(0, selector)], 1, Sets(site).visited) is None
    assert blocks.glance([row(0, selector)], 1, frozenset()) is not None


def test_a_request_is_decoded_in_compiled_blocks_and_its_report_says_what_was_kept() -> None:
    model = model_of()
    served = replace(loaded("llama"), decoder=model.decoder)
    stages: set[int] = set()
    ended: Queue[Finished | Failed] = Queue()
    with started(served, EngineConfig(kv_cache_tokens=1024)) as engine:
        selector = glance(engine.sparse_model, 0.25)
        assert model.decoder.compiled is not None
        model.decoder.compiled.on_step = lambda n, own, counters: stages.update(own[:, 0].tolist())

        def follow(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                ended.put(event)

        prompt = tuple(tokens(1)[0].tolist())
        sparsity = SparseInference("glance", selector)
        engine.submit(Request(prompt, follow, stop=StopParams(max_tokens=5, ignore_eos=True), sparsity=sparsity))
        end = ended.get(timeout=PATIENCE_SECONDS)
    model.decoder.compiled.on_step = None
    assert isinstance(end, Finished)
    assert end.sparsity is not None
    assert end.sparsity.active_ratio == pytest.approx(0.25)
    assert end.sparsity.sparse_tokens == 4
    assert {Stage.SPARSE_INPUT, Stage.CHOOSE, Stage.KEPT, Stage.KEPT_SUM} <= stages
