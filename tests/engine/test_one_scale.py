"""A value that is read, or watched, is on the scale of gates and abort conditions, however long its vector is."""

import pytest
import torch
from engine_runs import Bench, Job, Outcome, run_alone
from programs import prompt, shapes
from watch_runs import follow, loaded

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import Aborted
from patchclamp_server.interventions.program import (
    AbortCondition,
    AddVector,
    Comparison,
    Condition,
    Edit,
    Gate,
    PositionRange,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchItem

LENGTH, POSITION, LAYER = 12, 9, 1
LAST = Scope((TokenSelector(positions=PositionRange(POSITION, POSITION + 1)),))
TOKENS = prompt("one scale", LENGTH)
# As long as a vector of a real model: a value on another scale would be off by this factor.
VECTOR = Vector(values=60 * torch.nn.functional.normalize(torch.arange(1.0, 49.0).sin(), dim=0))
CONFIGS = {
    "operators": EngineConfig(kv_block_size=4, kv_cache_tokens=256),
    "kernels": EngineConfig(kv_block_size=4, kv_cache_tokens=256, kernels=True, decode_graphs=True),
}
each_executor = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def run(program: Program, config: EngineConfig) -> Outcome:
    return run_alone("llama", Job(TOKENS, program, max_tokens=2), config)


def value_read(config: EngineConfig) -> float:
    readout = Readout(ProjectionReadout((VECTOR,)), Site.RESID_POST, layers=(LAYER,), scope=LAST)
    return run(Program(readouts=(readout,)), config).readouts[0].values[0]


def value_watched(config: EngineConfig) -> float:
    item = WatchItem("d", WatchedDirection(VECTOR, Site.RESID_POST, (LAYER,)))
    with Bench("llama", config) as bench:
        followed = follow(bench, bind_watch([item], loaded("llama").info, None, max_items=1))
        bench.run([Job(TOKENS, max_tokens=2)])
    return float(followed.of(1)[POSITION][0])


def condition(comparison: Comparison, threshold: float) -> Condition:
    return Condition(Site.RESID_POST, LAYER, VECTOR, comparison, threshold, scope=LAST)


def gate_opens(comparison: Comparison, threshold: float, config: EngineConfig) -> bool:
    push = AddVector(Vector(values=torch.ones(shapes("llama").sites[Site.RESID_POST])))
    edit = Edit(push, Site.RESID_POST, layers=(LAYER + 1,), gate=Gate(condition(comparison, threshold)))
    receipt = run(Program(edits=(edit,)), config).end().receipt
    return receipt.edits[0].gate_firings == 1


def aborts(comparison: Comparison, threshold: float, config: EngineConfig) -> bool:
    ending = AbortCondition("at", condition(comparison, threshold))
    return isinstance(run(Program(abort_when=(ending,)), config).error, Aborted)


READ = {"a readout": value_read, "a watch": value_watched}
DECIDES = {"a gate": gate_opens, "abort_when": aborts}


@each_executor
@pytest.mark.parametrize("decides", DECIDES)
@pytest.mark.parametrize("read", READ)
def test_a_value_decides_at_itself_and_not_a_little_beside_it(read: str, decides: str, config: EngineConfig) -> None:
    value = READ[read](config)
    little = 1e-4 * max(1.0, abs(value))
    for comparison, inside in ((Comparison.ABOVE, value - little), (Comparison.BELOW, value + little)):
        outside = 2 * value - inside
        assert DECIDES[decides](comparison, inside, config)
        assert not DECIDES[decides](comparison, outside, config)


@each_executor
def test_the_length_of_a_vector_changes_no_readout(config: EngineConfig) -> None:
    vectors = tuple(Vector(values=VECTOR.values * factor, unit=unit) for factor in (1, 1e-3) for unit in (False, True))
    readout = Readout(ProjectionReadout(vectors), Site.RESID_POST, layers=(LAYER,), scope=LAST)
    values = run(Program(readouts=(readout,)), config).readouts[0].values
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)
