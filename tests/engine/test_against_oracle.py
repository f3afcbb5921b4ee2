"""Identical tokens and logits, receipts and readouts as plain transformers with naive hooks.

Every architecture × every kind of edit × alone / in a mixed batch / chunked prefill / preempted / from the prefix cache.
"""

from functools import cache

import pytest
from engine_runs import Bench, Job, assert_same, run_alone, truth
from patchclamp_server.engine.engine import EngineConfig
from patchclamp_server.interventions.program import Program
from programs import EDIT_KINDS, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from tiny_models import FAMILIES

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


def config(**options: int | bool) -> EngineConfig:
    return EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=1024, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_at_every_site(family: str, kind: str) -> None:
    s = shapes(family)
    with Bench(family, config(enable_prefix_cache=False)) as bench:
        for site in sites_of(kind, s):
            alone = Job(prompt(f"{family} {kind} {site}", 14), Program((edit(kind, site, s),)), max_tokens=2)
            assert_same(bench.run([alone])[0], truth(family, alone), 14)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family: str, case: str) -> None:
    asked = job(family, case)
    assert_same(run_alone(family, asked, config()), truth(family, asked), PROMPT_LENGTH)


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
                assert_same(outcome, truth(family, asked), PROMPT_LENGTH)
            except AssertionError as error:
                raise AssertionError(f"in the batch, {case}: {error}") from error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_chunked_prefill(family: str, case: str) -> None:
    asked = job(family, case)
    with Bench(family, config(max_tokens_per_step=5)) as bench:
        outcome = bench.run([asked])[0]
        assert bench.stats().steps >= -(-PROMPT_LENGTH // 5) + asked.max_tokens - 1
    assert_same(outcome, truth(family, asked), PROMPT_LENGTH)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_when_preempted(family: str, case: str) -> None:
    """Two requests fit the KV cache until they grow: the later one is preempted and computed again."""
    asked = job(family, case)
    rival = Job(prompt(f"{family} rival", PROMPT_LENGTH), Program())
    tight = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=12 * BLOCK, enable_prefix_cache=False)
    with Bench(family, tight) as bench:
        first, preempted = bench.run([rival, asked])
    assert preempted.end().usage.preemptions > 0
    assert bench.stats().preemptions > 0
    assert_same(first, truth(family, rival), PROMPT_LENGTH)
    assert_same(preempted, truth(family, asked), PROMPT_LENGTH)


# What is read or examined at the prompt has to be computed.
NOT_CACHED = {case for case in MIXED if "gate" in case or case == "border of two blocks"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_prefix_cache_hit(family: str, case: str) -> None:
    asked = job(family, case)
    with Bench(family, config()) as bench:
        bench.run([Job(asked.prompt, asked.program, max_tokens=1)])
        outcome = bench.run([asked])[0]
    if case in NOT_CACHED:
        assert outcome.end().usage.cached_prompt_tokens <= 1
    else:
        assert outcome.end().usage.cached_prompt_tokens > 0
    assert_same(outcome, truth(family, asked), PROMPT_LENGTH, reuse=True)
