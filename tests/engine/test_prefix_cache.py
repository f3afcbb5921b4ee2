"""A prefix is computed once for all requests that would compute the same numbers, and never shared by others."""

import torch
from engine_runs import Bench, Job, Outcome, assert_same, loaded

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.interventions.program import (
    AddVector,
    Comparison,
    Condition,
    Edit,
    Gate,
    Phase,
    PositionRange,
    Program,
    Readout,
    Scope,
    TokenSelector,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.model.sites import Site

FAMILY = "qwen3"
CONFIG = EngineConfig(max_sequences=32, max_tokens_per_step=2048, kv_block_size=16)
# 512 tokens of a system prompt, then 8 of a question.
SYSTEM = tuple(torch.randint(2, 200, (512,), generator=torch.Generator().manual_seed(5)).tolist())


def question(i: int) -> tuple[int, ...]:
    return (*SYSTEM, *(2 + (7 * i + j) % 190 for j in range(8)))


def add(seed: int, scope: Scope, gate: Gate | None = None) -> Program:
    values = torch.randn(loaded(FAMILY).info.d_model, generator=torch.Generator().manual_seed(seed))
    edit = Edit(AddVector(Vector(values=values)), Site.RESID_POST, layers=(1,), scope=scope, gate=gate)
    return Program(edits=(edit,))


def from_position(start: int) -> Scope:
    return Scope((TokenSelector(positions=PositionRange(start)),))


GENERATED = Scope((TokenSelector(phase=Phase.GENERATED),))


def test_a_system_prompt_under_16_generated_only_programs_is_computed_once() -> None:
    jobs = [Job(question(i), add(i, GENERATED), max_tokens=4) for i in range(16)]
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = bench.run(jobs)
        stats = bench.stats()
    # The system prompt once, and each question; nothing else was prefilled.
    assert stats.prefill_tokens == 512 + 16 * 8
    assert stats.prefix_hit_tokens == 15 * 512
    assert sorted(o.end().usage.cached_prompt_tokens for o in outcomes) == [0] + [512] * 15
    for job, outcome in zip(jobs[:3], outcomes[:3], strict=True):
        assert_same(FAMILY, job, outcome)


def test_programs_that_touch_the_prompt_share_it_up_to_the_first_touched_token() -> None:
    first_touched = 200
    jobs = [Job(question(i), add(i, from_position(first_touched)), max_tokens=3) for i in range(4)]
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = bench.run(jobs)
    shared = first_touched // 16 * 16
    assert sorted(o.end().usage.cached_prompt_tokens for o in outcomes) == [0, shared, shared, shared]
    for job, outcome in zip(jobs[:2], outcomes[:2], strict=True):
        assert_same(FAMILY, job, outcome)


def test_the_same_program_shares_what_it_touched_and_its_receipt_says_so() -> None:
    program = add(3, from_position(0))
    jobs = [Job(question(i), program, max_tokens=3) for i in range(2)]
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = [bench.run([job])[0] for job in jobs]
    second = outcomes[1].end()
    assert second.usage.cached_prompt_tokens == 512
    assert second.receipt.edits[0].rows_from_cache == 512
    # 8 tokens of the question, and 2 generated ones that were fed back.
    assert second.receipt.edits[0].rows == 10
    assert_same(FAMILY, jobs[1], outcomes[1], reuse=True)


def test_another_strength_is_another_prefix() -> None:
    weak, strong = add(3, from_position(0)), add(3, from_position(0))
    strong = Program(edits=(Edit(strong.edits[0].kind, Site.RESID_POST, layers=(1,), strength=2.0),))
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = [bench.run([Job(question(0), program, max_tokens=2)])[0] for program in (weak, strong)]
    assert outcomes[1].end().usage.cached_prompt_tokens == 0


def test_tokens_that_a_readout_asks_for_are_computed() -> None:
    readout = Readout(TopNeuronsReadout(2), Site.MLP_POST, layers=(0,), scope=from_position(100))
    with Bench(FAMILY, CONFIG) as bench:
        bench.run([Job(question(0), max_tokens=2)])
        outcome = bench.run([Job(question(0), Program(readouts=(readout,)), max_tokens=2)])[0]
    assert outcome.end().usage.cached_prompt_tokens == 96
    assert [value.position for value in outcome.readouts] == list(range(100, 521))


def test_a_latch_is_never_skipped_by_a_cached_prefix() -> None:
    values = torch.randn(loaded(FAMILY).info.d_model, generator=torch.Generator().manual_seed(1))
    condition = Condition(Site.RESID_PRE, 0, Vector(values=values), Comparison.ABOVE, -1e9)
    program = add(2, GENERATED, Gate(condition, latched=True))
    job = Job(question(0), program, max_tokens=3)
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = [bench.run([job])[0] for _ in range(2)]
    for outcome in outcomes:
        assert outcome.end().usage.cached_prompt_tokens == 0
        assert_same(FAMILY, job, outcome)


def test_turning_the_cache_off_shares_nothing() -> None:
    config = EngineConfig(max_tokens_per_step=2048, enable_prefix_cache=False)
    with Bench(FAMILY, config) as bench:
        outcomes = [bench.run([Job(question(0), max_tokens=2)])[0] for _ in range(2)]
    assert [o.end().usage.cached_prompt_tokens for o in outcomes] == [0, 0]
    assert outcomes[0].tokens == outcomes[1].tokens


def cache_of(n_blocks: int) -> KvCache:
    device = torch.device("cpu")
    return KvCache(
        n_layers=1, n_blocks=n_blocks + 1, block_size=4, n_kv_heads=1, head_dim=2, dtype=torch.float32, device=device
    )


def known_blocks(cache: KvCache, n: int) -> list[int]:
    """n blocks whose content is known, b"0" and on, and which somebody holds."""
    held = [block for _ in range(n) if (block := cache.allocate()) is not None]
    for index, block in enumerate(held):
        cache.register(block, b"%d" % index)
    return held


def test_the_ends_of_prefixes_are_evicted_before_their_beginnings() -> None:
    """Six blocks: a prefix of four leaves the two that it begins with when four others are needed."""
    cache = cache_of(6)
    prefix = known_blocks(cache, 4)
    cache.release(prefix)
    assert cache.n_cached == 4
    for _ in range(4):
        assert cache.allocate() is not None
    assert [cache.lookup(b"%d" % index) for index in range(4)] == [prefix[0], prefix[1], None, None]


def test_a_block_that_is_held_again_is_not_given_away() -> None:
    cache = cache_of(3)
    blocks = known_blocks(cache, 2)
    cache.release(blocks)
    cache.hold(blocks[0])
    assert cache.n_free == 2
    assert blocks[0] not in {cache.allocate() for _ in range(2)}
    assert cache.allocate() is None
    assert cache.lookup(b"0") == blocks[0]


def test_equal_blocks_after_another_beginning_are_others() -> None:
    """The second prompt begins with what is the second block of the first."""
    jobs = [Job((*SYSTEM[16 * start : 64], 5, 6, 7), max_tokens=3) for start in (0, 1)]
    with Bench(FAMILY, CONFIG) as bench:
        outcomes = [bench.run([job])[0] for job in jobs]
    assert [o.end().usage.cached_prompt_tokens for o in outcomes] == [0, 0]
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert_same(FAMILY, job, outcome)


def test_of_a_prefix_that_was_partly_evicted_the_beginning_is_still_reused() -> None:
    config = EngineConfig(kv_block_size=16, kv_cache_tokens=40 * 16, max_tokens_per_step=2048)
    with Bench(FAMILY, config) as bench:
        bench.run([Job(question(0), max_tokens=1)])
        # 32 blocks of the 40 are known; ten others need two of them.
        bench.run([Job(tuple(2 + i % 190 for i in range(155)), max_tokens=1)])
        again = bench.run([Job(question(1), max_tokens=1)])[0]
    assert again.end().usage.cached_prompt_tokens == 30 * 16


def test_a_request_does_not_wait_for_a_prefix_that_less_urgent_work_computes() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_tokens_per_step=64, kv_block_size=16))
    analysed, asked, alone = Outcome(), Outcome(), Outcome()
    stop = StopParams(max_tokens=4, ignore_eos=True)
    engine.submit(Request(question(1), analysed.on_event, stop=stop, priority=Priority.ANALYSIS))
    engine.step()
    engine.submit(Request(question(1), asked.on_event, stop=stop))
    for _ in range(2):
        engine.step()
    assert engine.scheduler.running[0].request.on_event == asked.on_event
    assert engine.scheduler.running[0].computed == 16 + 2 * 64
    while engine.step():
        pass
    engine.submit(Request(question(1), alone.on_event, stop=stop))
    while engine.step():
        pass
    assert asked.tokens == analysed.tokens == alone.tokens
