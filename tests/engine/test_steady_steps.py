"""Steps in which nothing changes compile nothing, also beside programs that read, watch, gate and abort: counted on
both executors. The kernels run by their references, and once in Triton's interpreter."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import pytest
import torch
from engine_runs import loaded
from watch_runs import neurons_watch

from patchclamp_kernels.runtime import INTERPRETED, reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.executors.kernel_executor import KernelExecutor
from patchclamp_server.engine.executors.operator_executor import OperatorExecutor
from patchclamp_server.engine.request import Event, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import (
    AbortCondition,
    AddVector,
    Comparison,
    Condition,
    Edit,
    Gate,
    LogitLensReadout,
    NeuronReadout,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    TokenSelector,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.watch import WatchOptions

FAMILY = "llama"
PROMPT = (3, 5, 9)
EXECUTORS = ["operators", "kernels"]


def vector(seed: int) -> Vector:
    width = loaded(FAMILY).info.d_model
    return Vector(values=torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def adds(seed: int, scope: Scope = Scope()) -> Program:  # noqa: B008
    return Program((Edit(AddVector(vector(seed)), Site.RESID_POST, layers=(0, 1), strength=0.1, scope=scope),))


def reads(kind: ProjectionReadout | NeuronReadout | TopNeuronsReadout | LogitLensReadout, site: Site) -> Program:
    return Program(readouts=(Readout(kind, site, "read", layers=(0, 2)),))


def never(seed: int) -> Condition:
    return Condition(Site.RESID_PRE, 1, vector(seed), Comparison.ABOVE, 1e9)


READERS = {
    "projection": reads(ProjectionReadout((vector(1), vector(2))), Site.RESID_POST),
    "neurons": reads(NeuronReadout((7, 3, 11)), Site.MLP_POST),
    "gates of neurons": reads(NeuronReadout((7, 3)), Site.MLP_GATE),
    "top neurons": reads(TopNeuronsReadout(3), Site.MLP_POST),
    "logit lens": reads(LogitLensReadout(2), Site.RESID_POST),
    "abort": Program(abort_when=(AbortCondition("stop", never(3)),)),
    "gate": Program((Edit(AddVector(vector(4)), Site.RESID_POST, layers=(1,), gate=Gate(never(5), latched=True)),)),
}


class Run:
    """An engine whose sequences all decode, and what they were told."""

    def __init__(self, programs: Sequence[Program | None], executor: str, most_tokens: int = 1024) -> None:
        config = EngineConfig(
            max_sequences=256,
            max_tokens_per_step=most_tokens,
            kernels=executor == "kernels",
            enable_prefix_cache=False,
        )
        self.engine = Engine(loaded(FAMILY), config)
        for program in programs:
            self.submit(program)
        for _ in range(4):
            self.step()

    def submit(self, program: Program | None, prompt: tuple[int, ...] = PROMPT) -> list[Event]:
        events: list[Event] = []
        bound = None if program is None else bind(program, loaded(FAMILY).info)
        stop = StopParams(max_tokens=32, ignore_eos=True)
        self.engine.submit(Request(prompt, events.append, program=bound, stop=stop))
        return events

    def step(self) -> None:
        assert self.engine.step()

    @property
    def compilations(self) -> int:
        executor = self.engine.executor
        assert isinstance(executor, OperatorExecutor | KernelExecutor)
        return executor.planner.compilations

    def compiled_in(self, steps: int) -> int:
        before = self.compilations
        for _ in range(steps):
            self.step()
        return self.compilations - before


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    with reference_only():
        yield request.param


@pytest.mark.parametrize("kind", READERS)
def test_a_steady_step_beside_a_reader_compiles_nothing(executor: str, kind: str) -> None:
    run = Run([adds(1), adds(2), READERS[kind]], executor)
    assert run.compilations > 0
    assert run.compiled_in(3) == 0


@pytest.mark.parametrize("on", ["operators", "kernels in the interpreter"])
def test_all_readers_and_a_watch_together_compile_nothing(on: str) -> None:
    if on != "operators" and not INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 was not set when Triton was imported")
    programs = READERS.values()
    everything = Program(
        sum((p.edits for p in programs), ()),
        tuple(replace(r, name=f"{i}") for i, r in enumerate(sum((p.readouts for p in programs), ()))),
        sum((p.abort_when for p in programs), ()),
    )
    run = Run([adds(1), everything], on.split()[0])
    run.engine.monitor.start("sha256:w", neurons_watch(), WatchOptions("seen"))
    run.step()
    assert run.compiled_in(2) == 0


def test_a_scope_that_looks_at_the_token_is_compiled_alone(executor: str) -> None:
    moving = adds(9, Scope((TokenSelector(token_ids=(4,)),)))
    run = Run([adds(1), READERS["projection"], moving, adds(2)], executor)
    assert run.compiled_in(3) == 3


def test_a_prompt_that_arrives_in_chunks_is_compiled_alone(executor: str) -> None:
    run = Run([adds(1), READERS["projection"], adds(2)], executor, most_tokens=9)
    run.submit(adds(3), prompt=tuple(range(3, 23)))
    assert run.compiled_in(3) == 3


def test_readings_of_kept_plans_move_on_with_the_positions(executor: str) -> None:
    run = Run([adds(1)], executor)
    events = run.submit(READERS["projection"])
    for _ in range(6):
        run.step()
    positions = [v.position for event in events for v in getattr(event, "values", ()) if v.layer == 0]
    assert positions == list(range(len(positions)))
    assert len(positions) > len(PROMPT) + 3


@contextmanager
def calls_counted() -> Iterator[Callable[[], tuple[int, int]]]:
    """Calls of Python functions of the server, and of those that have to do with programs."""
    server, programs = 0, 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal server, programs
        if event == "call":
            server += "/patchclamp_server/" in frame.f_code.co_filename
            programs += "/patchclamp_server/interventions/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        yield lambda: (server, programs)
    finally:
        sys.setprofile(None)


def calls_of_a_step(programs: Sequence[Program], executor: str) -> tuple[int, int]:
    run = Run(programs, executor)
    with calls_counted() as calls:
        run.step()
    return calls()


def test_one_reader_among_programs_calls_little_more_python(executor: str) -> None:
    """In one steady step. The constant is the reader's own: its values, its event, and what looks at its places."""
    programs = [adds(seed) for seed in range(64 if executor == "operators" else 8)]
    server, own = calls_of_a_step(programs, executor)
    reading = Program(programs[0].edits, READERS["projection"].readouts)
    read_server, read_own = calls_of_a_step([reading, *programs[1:]], executor)
    assert read_server <= 1.1 * server + 50
    assert read_own <= 1.1 * own + 25
