"""Identical tokens and logits, receipts and readouts as plain transformers with naive hooks.

For every architecture and every kind of edit: alone, in a mixed batch, with chunked prefill, preempted, and from the
prefix cache.
"""

from functools import cache

import pytest
from engine_runs import Bench, Job, Outcome, assert_same, bound, loaded, run_alone
from oracle_formulas import in_scope
from programs import EDIT_KINDS, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from tiny_models import FAMILIES

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.interventions.program import Program
from patchclamp_server.model.sites import Site

# Longer than the sliding windows, and not a multiple of the blocks.
PROMPT_LENGTH = 22
BLOCK = 4

MIXED = tuple(mixed(shapes("llama")))
CASES = (*EDIT_KINDS, *MIXED)


@cache
def job(family: str, case: str) -> Job:
    s = shapes(family)
    program = one_of_each_kind(s)[case] if case in EDIT_KINDS else mixed(s)[case]
    return Job(prompt(f"{family} {case}", PROMPT_LENGTH), program)


def looks_at_the_start(asked: Job) -> bool:
    """Whether the program reads or examines one of the first tokens, which then have to be computed."""
    program = asked.program or Program()
    scopes = [readout.scope for readout in program.readouts]
    scopes += [edit.gate.condition.scope for edit in program.edits if edit.gate is not None]
    first_block = range(BLOCK)
    return any(
        in_scope(scope, position, asked.prompt, PROMPT_LENGTH, None) for scope in scopes for position in first_block
    )


def config(**options: int | bool) -> EngineConfig:
    return EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=1024, **options)  # type: ignore[arg-type]


@pytest.mark.drawn(0.4)
@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_at_every_site(family: str, kind: str) -> None:
    s = shapes(family)
    with Bench(family, config(enable_prefix_cache=False)) as bench:
        for site in sites_of(kind, s):
            alone = Job(prompt(f"{family} {kind} {site}", 14), Program((edit(kind, site, s),)), max_tokens=2)
            assert_same(family, alone, bench.run([alone])[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family: str, case: str) -> None:
    asked = job(family, case)
    assert_same(family, asked, run_alone(family, asked, config()))


@pytest.mark.parametrize("first", range(0, len(CASES), 7))
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_mixed_batch_of_eight_different_programs(family: str, first: int) -> None:
    """Seven programs and an unsteered request, prompts and decode steps mixed in the same steps."""
    chosen = [CASES[(first + i) % len(CASES)] for i in range(7)]
    jobs = [job(family, case) for case in chosen] + [Job(prompt(f"{family} plain", PROMPT_LENGTH), Program())]
    with Bench(family, config(max_tokens_per_step=2 * PROMPT_LENGTH + 9)) as bench:
        outcomes = bench.run(jobs)
        for case, asked, outcome in zip([*chosen, "plain"], jobs, outcomes, strict=True):
            try:
                assert_same(family, asked, outcome)
            except AssertionError as error:
                raise AssertionError(f"in the batch, {case}: {error}") from error


@pytest.mark.drawn(0.3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_chunked_prefill(family: str, case: str) -> None:
    asked = job(family, case)
    with Bench(family, config(max_tokens_per_step=5)) as bench:
        outcome = bench.run([asked])[0]
        assert bench.stats().steps >= -(-PROMPT_LENGTH // 5) + asked.max_tokens - 1
    assert_same(family, asked, outcome)


@pytest.mark.drawn(0.2)
@pytest.mark.parametrize("reuse", [False, True], ids=["recomputed", "own blocks reused"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_when_preempted(family: str, case: str, reuse: bool) -> None:
    """Two requests fit the KV cache until they grow: the later one is preempted and computed again."""
    asked = job(family, case)
    rival = Job(prompt(f"{family} rival", PROMPT_LENGTH), Program())
    tight = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=12 * BLOCK, enable_prefix_cache=reuse)
    with Bench(family, tight) as bench:
        first, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert bench.stats().preemptions > 0
    assert_same(family, rival, first)
    assert_same(family, asked, preempted)


def test_what_is_recomputed_token_by_token_is_counted_once() -> None:
    """Recomputing generated tokens one by one looks like decoding, and must neither be counted nor reuse its plan."""
    asked = Job(prompt("again", 14), Program((edit("add", Site.RESID_POST, shapes("llama")),)), max_tokens=8)
    engine = Engine(
        loaded("llama"),
        EngineConfig(
            kv_block_size=BLOCK, kv_cache_tokens=1024, enable_prefix_cache=False, max_tokens_per_step=1, max_sequences=1
        ),
    )
    outcome, rival = Outcome(), Outcome()
    stop = StopParams(max_tokens=asked.max_tokens, ignore_eos=True)
    program = bound("llama", asked)
    engine.submit(Request(asked.prompt, outcome.on_event, program=program, stop=stop, priority=Priority.BATCH))
    engine.on_logits = lambda _, position, logits: outcome.logits.append(logits.clone()) if position >= 14 else None
    while len(outcome.tokens) < 5:
        assert engine.step()
    urgent = Request(prompt("rival", 28), rival.on_event, stop=StopParams(max_tokens=0))
    engine.submit(urgent)
    while engine.step():
        pass
    assert rival.end().usage.prompt_tokens == 28
    assert outcome.end().usage.preemptions == 1
    assert_same("llama", asked, outcome)


@pytest.mark.drawn(0.3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_prefix_cache_hit(family: str, case: str) -> None:
    asked = job(family, case)
    with Bench(family, config()) as bench:
        bench.run([Job(asked.prompt, asked.program, max_tokens=1)])
        outcome = bench.run([asked])[0]
    if not looks_at_the_start(asked):
        assert outcome.end().usage.cached_prompt_tokens > 0
    assert_same(family, asked, outcome, reuse=True)


@pytest.mark.drawn(0.2)
@pytest.mark.parametrize("steered_first", [False, True], ids=["plain first", "steered first"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_another_program_are_not_taken_for_its_own(family: str, case: str, steered_first: bool) -> None:
    """Unsteered and steered requests in turn, on one prompt: each finds blocks of the others in the cache."""
    steered = job(family, case)
    plain = Job(steered.prompt, Program())
    with Bench(family, config()) as bench:
        for asked in (steered, plain, steered) if steered_first else (plain, steered, plain):
            assert_same(family, asked, bench.run([asked])[0], reuse=True)
