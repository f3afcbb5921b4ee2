"""Whatever the programs and whoever shares the batch, the answers are the oracle's."""

from dataclasses import replace

import pytest
from engine_runs import Bench, Job, assert_same, truth
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from programs import prompt, shapes
from random_programs import programs
from tiny_models import FAMILIES

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.interventions.program import Program

# Below this distance from a threshold, or between two logits, rounding may decide.
CLEAR = 1e-3
LENGTHS = (1, 2, 7, 13, 20)


@st.composite
def jobs(draw: st.DrawFn, family: str) -> Job:
    length = draw(st.sampled_from(LENGTHS))
    # Few prompts, so that requests of one batch share prefixes.
    tokens = prompt(f"{family} {draw(st.integers(0, 1))}", max(LENGTHS))[:length]
    return Job(tokens, draw(programs(shapes(family))), max_tokens=draw(st.integers(1, 5)))


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    return EngineConfig(
        max_sequences=draw(st.sampled_from((2, 8))),
        max_tokens_per_step=draw(st.sampled_from((3, 16, 512))),
        kv_block_size=draw(st.sampled_from((1, 4, 16))),
        # Room for one sequence at least: the longest is 25 tokens.
        kv_cache_tokens=draw(st.sampled_from((32, 64, 1024))),
        enable_prefix_cache=draw(st.booleans()),
    )


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@given(data=st.data(), family=st.sampled_from(FAMILIES), config=configs())
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
def test_random_programs_in_random_batches_are_answered_as_by_the_oracle(
    kernels: bool, data: st.DataObject, family: str, config: EngineConfig
) -> None:
    config = replace(config, kernels=kernels, decode_graphs=kernels)
    batch = data.draw(st.lists(jobs(family), min_size=1, max_size=5))
    for job in batch:
        expected = truth(family, job)
        assume(expected.condition_margin > CLEAR)
        assume(expected.token_margin > CLEAR)
    # The torch references of the kernels: the kernels themselves are tested against them.
    with reference_only(), Bench(family, config) as bench:
        outcomes = bench.run(batch)
        again = bench.run(batch)
    for job, outcome in zip([*batch, *batch], [*outcomes, *again], strict=True):
        assert_same(family, job, outcome, reuse=config.enable_prefix_cache)


@given(data=st.data(), family=st.sampled_from(FAMILIES))
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_an_unsteered_request_is_answered_the_same_beside_random_programs(data: st.DataObject, family: str) -> None:
    beside = data.draw(st.lists(jobs(family), min_size=1, max_size=4))
    plain = Job(prompt(f"{family} plain", 17), Program(), max_tokens=4)
    with Bench(family, EngineConfig(kv_block_size=4, kv_cache_tokens=1024)) as bench:
        outcome = bench.run([*beside, plain])[-1]
    assert_same(family, plain, outcome)
