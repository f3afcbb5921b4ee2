"""Compiled blocks give, bit for bit, what the loop over layers in Python gives: any family, stops and threads."""

import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numba
import numpy as np
import pytest
import torch
from coded_models import rounding_decoder
from engine_runs import loaded
from numba import types
from sparse_models import documents
from tiny_models import FAMILIES, LAYERS
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.cpu.atomics import floats_at
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import TILED, TiledPool
from patchclamp_server.model.attention.row_attention import write
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.compiled import team
from patchclamp_server.model.compiled.blocks import CompiledBlocks
from patchclamp_server.model.compiled.job import CompiledVisits, Job
from patchclamp_server.model.decoder import NO_HOOKS, Decoder, SiteHooks, StepInputs
from patchclamp_server.model.sites import FORWARD_ORDER, PREACTIVATION_SITES, Site

BLOCK = 16
# Of each sequence.
BLOCKS = 40
# Tokens of each sequence that are there before the step, and its rows in the step.
MIXED = ((40, 1), (3, 1), (17, 1), (0, 21), (16, 5))
PLACES = frozenset((site, layer) for site in FORWARD_ORDER for layer in range(LAYERS))


def compiled_of(decoder: Decoder) -> CompiledBlocks:
    assert decoder.compiled is not None
    return decoder.compiled


@contextmanager
def in_python(decoder: Decoder) -> Iterator[None]:
    kept, decoder.compiled = decoder.compiled, None
    try:
        yield
    finally:
        decoder.compiled = kept


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_of(decoder: Decoder, sequences: Sequence[tuple[int, int]], visited: Set[tuple[Site, int]]) -> StepInputs:
    spans, row = [], 0
    for i, (offset, n) in enumerate(sequences):
        spans.append(Span(row, n, offset, list(range(1 + BLOCKS * i, 1 + BLOCKS * (i + 1)))))
        row += n
    positions = np.concatenate([np.arange(s.offset, s.offset + s.n) for s in spans])
    slots = [s.blocks[p // BLOCK] * BLOCK + p % BLOCK for s in spans for p in range(s.offset, s.offset + s.n)]
    sites = decoder.spec.sites
    return StepInputs(
        torch.arange(row) * 7 % decoder.spec.vocab_size,
        torch.from_numpy(positions),
        torch.tensor(slots),
        AttentionBatch(spans, BLOCK, decoder.windows, decoder.device),
        frozenset(layer for site, layer in visited if site is Site.ATTN_Q),
        {p: p[1] != 1 for p in visited if p[0] in PREACTIVATION_SITES and p[0] in sites},
    )


def filled_pools(decoder: Decoder, dtype: torch.dtype = torch.float32) -> list[TiledPool]:
    spec, generator = decoder.spec, torch.Generator().manual_seed(5)
    n_blocks = 1 + BLOCKS * len(MIXED)
    pools = [TiledPool(n_blocks, BLOCK, spec.n_kv_heads, spec.head_dim, dtype) for _ in range(spec.n_layers)]
    every = torch.arange(n_blocks * BLOCK)
    for pool in pools:
        k, v = torch.randn(2, len(every), spec.n_kv_heads, spec.head_dim, generator=generator)
        write(k, v, every, pool)
    return pools


@dataclass
class Shift:
    """Adds a ramp to every other channel wherever it is called, and keeps what it found."""

    visited: Set[tuple[Site, int]] | None
    edits: bool = True
    seen: list[tuple[Site, int, Tensor]] = field(default_factory=list)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if self.visited is not None and (site, layer) not in self.visited:
            return
        self.seen.append((site, layer, x.clone()))
        if self.edits:
            x[:, ::2] += torch.linspace(-0.1, 0.1, x.shape[0])[:, None]


def same(
    decoder: Decoder,
    step: StepInputs,
    visited: Set[tuple[Site, int]],
    *,
    edits: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Checks output, pools, peaks and what hooks saw of a compiled run against the one in Python."""
    ours, theirs = Shift(visited, edits), Shift(visited, edits)
    pools, expected_pools = filled_pools(decoder, dtype), filled_pools(decoder, dtype)
    got = decoder.forward(step, pools, ours)
    kept = None if step.peaks is None else [t.clone() for t in peak_tensors(step.peaks)]
    with in_python(decoder):
        expected = decoder.forward(step, expected_pools, theirs)
    assert torch.equal(got, expected)
    for pool, wanted in zip(pools, expected_pools, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pool.arrays, wanted.arrays, strict=True))
    assert [s[:2] for s in ours.seen] == [s[:2] for s in theirs.seen]
    for (_, _, x), (_, _, y) in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(x, y)
    if step.peaks is not None and kept is not None:
        assert all(torch.equal(a, b) for a, b in zip(kept, peak_tensors(step.peaks), strict=True))


def peak_tensors(peaks: Peaks) -> list[Tensor]:
    assert peaks.off_sink is not None
    return [peaks.positions, peaks.probabilities, peaks.off_sink]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_mixed_step_of_every_family_is_the_same_without_stops(family: str, n_threads: int) -> None:
    decoder = loaded(family).decoder
    compiled_of(decoder)
    with threads(n_threads):
        same(decoder, step_of(decoder, MIXED, frozenset()), frozenset())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_row_of_every_family_is_the_same(family: str) -> None:
    decoder = loaded(family).decoder
    with threads(2):
        same(decoder, step_of(decoder, [(40, 1)], frozenset()), frozenset())


@pytest.mark.parametrize("dtype", TILED)
@pytest.mark.parametrize("sequences", [((600, 1),), ((550, 1), (3, 1), (17, 1), (0, 21), (500, 40))])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_long_contexts_in_every_dtype_of_keys_are_the_same(
    family: str, sequences: Sequence[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Several chunks of keys, which threads share where there is one row."""
    decoder = loaded(family).decoder
    n = sum(rows for _, rows in sequences)
    peaks = Peaks({1: np.arange(n)}, n, decoder.spec.n_heads, decoder.device, off_sink=True)
    with threads(3):
        same(decoder, replace(step_of(decoder, sequences, frozenset()), peaks=peaks), frozenset(), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edits", [True, False])
def test_hooks_that_visit_every_place_see_and_edit_the_same(family: str, edits: bool) -> None:
    decoder = loaded(family).decoder
    visited = frozenset(p for p in PLACES if p[0] in decoder.spec.sites or p[0] is Site.ATTN_Q)
    with threads(2):
        same(decoder, step_of(decoder, MIXED, visited), visited, edits=edits)


@pytest.mark.parametrize("site", FORWARD_ORDER)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_stop_at_one_place_sees_and_edits_the_same(family: str, layer: int, site: Site) -> None:
    decoder = loaded(family).decoder
    if site not in decoder.spec.sites and site is not Site.ATTN_Q:
        pytest.skip("the family has no such site")
    visited = frozenset({(site, layer)})
    same(decoder, step_of(decoder, MIXED, visited), visited)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("sequences", [MIXED, [(40, 1)]])
def test_peaks_of_heads_are_the_same(family: str, sequences: Sequence[tuple[int, int]]) -> None:
    decoder = loaded(family).decoder
    n = sum(rows for _, rows in sequences)
    plain = step_of(decoder, sequences, frozenset())
    peaks = Peaks({1: np.arange(n)}, n, decoder.spec.n_heads, decoder.device, off_sink=True)
    with threads(2):
        same(decoder, replace(plain, peaks=peaks), frozenset())


def test_what_hooks_of_unknown_places_see_is_run_in_python() -> None:
    decoder, text = loaded("llama").decoder, documents(1, 4, seed=1)
    hooks = Shift(None)
    decoder.forward(inputs_of(text, 0, 4, decoder), pools_for(decoder, text), hooks)
    assert {place[:2] for place in hooks.seen} >= {(Site.RESID_PRE, 0), (Site.MLP_OUT, LAYERS - 1)}


@numba.cfunc(types.void(types.int64, types.int64, types.int64))
def first_number(x_at: int, number: int, state_at: int) -> None:
    numba.carray(floats_at(state_at), (64,))[number] = numba.carray(floats_at(x_at), (1,))[0]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_what_is_called_without_python_sees_what_hooks_see(family: str) -> None:
    """Every place is looked at, half of them by a C function, and edited at the others."""
    decoder = loaded(family).decoder
    sites = [s for s in FORWARD_ORDER if s in decoder.spec.sites and s not in PREACTIVATION_SITES]
    places = [(site, layer) for layer in range(LAYERS) for site in sites]
    seen = np.zeros(64, dtype=np.float32)
    numbers = {place: number for number, place in enumerate(places) if number % 2}
    calls = {place: ((first_number.address, number, seen.ctypes.data),) for place, number in numbers.items()}
    called, visited = Shift(frozenset(places) - frozenset(numbers)), Shift(frozenset(places))
    step = step_of(decoder, MIXED, frozenset())

    def visit(site: Site, layer: int, x: Tensor) -> None:
        if (site, layer) in numbers:
            visited.seen.append((site, layer, x.clone()))
        else:
            Shift.visit(visited, site, layer, x)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(called, "visited", frozenset(places))
        patched.setattr(visited, "visit", visit)
        got = decoder.forward(replace(step, compiled_visits=CompiledVisits(calls)), filled_pools(decoder), called)
        with in_python(decoder):
            expected = decoder.forward(step, filled_pools(decoder), visited)
    assert torch.equal(got, expected)
    wanted = {(site, layer): float(x[0, 0]) for site, layer, x in visited.seen}
    assert {place: float(seen[number]) for place, number in numbers.items()} == {p: wanted[p] for p in numbers}


def test_what_is_given_is_not_changed() -> None:
    decoder, text = loaded("llama").decoder, documents(1, 4, seed=1)
    step = inputs_of(text, 0, 4, decoder)
    x = decoder.embed(step.token_ids, step.positions)
    before = x.clone()
    decoder.run_blocks(x, range(LAYERS), step, pools_for(decoder, text))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("field", "value", "name"), [("positions", 640, "position"), ("slots", 16 * 201, "slot"), ("slots", -1, "slot")]
)
def test_an_index_outside_of_its_table_is_an_error_and_not_read(field: str, value: int, name: str) -> None:
    decoder = loaded("llama").decoder
    step = step_of(decoder, MIXED, frozenset())
    indices = getattr(step, field).clone()
    indices[-1] = value
    with pytest.raises(IndexError, match=name):
        decoder.forward(replace(step, **{field: indices}), filled_pools(decoder))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_stage_that_fails_is_an_error_and_nobody_waits_for_it(n_threads: int) -> None:
    decoder = loaded("llama").decoder
    compiled = compiled_of(decoder)
    with threads(n_threads), pytest.MonkeyPatch.context() as patched:
        broken = compiled._job.copy()
        # The loop of the activation asks for memory by neurons first, and there is not so much.
        broken[Job.D_FF] = 1 << 46
        patched.setattr(compiled, "_job", broken)
        with pytest.raises(RuntimeError, match="stage"):
            decoder.forward(step_of(decoder, [(40, 1)], frozenset()), filled_pools(decoder))
    same(decoder, step_of(decoder, MIXED, frozenset()), frozenset())


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_row_of_zeros_without_an_epsilon_is_not_a_number(n_threads: int) -> None:
    decoder = loaded("llama").decoder
    compiled = compiled_of(decoder)
    step = step_of(decoder, MIXED, frozenset())
    with threads(n_threads):
        # Its address stays.
        before = compiled._epsilons.copy()
        compiled._epsilons[:] = 0
        try:
            x = decoder.run_blocks(torch.zeros(len(step.token_ids), 48), range(LAYERS), step, filled_pools(decoder))
        finally:
            compiled._epsilons[:] = before
    assert not torch.isfinite(x).any()


def test_the_next_hooks_stop_at_their_own_places() -> None:
    decoder = loaded("llama").decoder
    for visited in (frozenset({(Site.MLP_POST, 0)}), frozenset({(Site.RESID_MID, 2)}), frozenset()):
        same(decoder, step_of(decoder, MIXED, visited), visited)


def test_steps_at_the_same_time_give_what_they_give_alone() -> None:
    decoder = loaded("llama").decoder
    step = step_of(decoder, MIXED, frozenset())
    expected = decoder.forward(step, filled_pools(decoder))
    wrong: list[bool] = []

    def run(hooks: SiteHooks) -> None:
        pools = filled_pools(decoder)
        for _ in range(30):
            wrong.append(not torch.equal(decoder.forward(step, pools, hooks), expected))

    with threads(3):
        running = [threading.Thread(target=run, args=(NO_HOOKS,)) for _ in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert wrong == [False] * 120


def test_a_thread_that_has_no_help_does_all_stages() -> None:
    decoder = loaded("llama").decoder
    with threads(3):
        lock = team.team_of(3)._lock
        with lock:
            same(decoder, step_of(decoder, MIXED, frozenset()), frozenset())


def test_helpers_sleep_between_jobs_and_wake() -> None:
    decoder = loaded("llama").decoder
    step = step_of(decoder, MIXED, frozenset())
    own = team.Team(3)
    expected = decoder.forward(step, filled_pools(decoder))
    board = own._board
    asleep = [team._ASLEEP + i * team._LINE for i in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("patchclamp_server.model.compiled.blocks.team_of", lambda _: own)
        for _ in range(3):
            waiting = threading.Event()
            while not all(board[at] for at in asleep):
                waiting.wait(0.001)
            assert torch.equal(decoder.forward(step, filled_pools(decoder)), expected)
            assert board[team._ACTIVE] == 0


# Of one after the other, with norms behind as well, and side by side.
ROUNDED = ("llama", "gemma2", "gpt_neox")


@pytest.mark.parametrize("family", ROUNDED)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_rounded_activations_are_the_same_in_python(family: str, n_threads: int) -> None:
    decoder = rounding_decoder(family)
    compiled_of(decoder)
    with threads(n_threads):
        for sequences in (MIXED, ((23, 1),)):
            for visited in (frozenset(), PLACES):
                same(decoder, step_of(decoder, sequences, visited), visited)


@pytest.mark.parametrize("family", ROUNDED)
def test_logits_of_rounded_states_are_those_of_each_alone(family: str) -> None:
    decoder = rounding_decoder(family)
    x = torch.randn(9, decoder.spec.d_model, generator=torch.Generator().manual_seed(0))
    logits = decoder.logits(x)
    assert torch.equal(torch.cat([decoder.logits(row) for row in x.split(1)]), logits)
    assert torch.equal(decoder.unembed(decoder.final_norm(x)), logits)
    with in_python(decoder):
        assert torch.equal(decoder.logits(x), logits)
