"""What a decode step costs depends on the kinds of edit in use, not on how many programs use them: counted."""

from collections.abc import Sequence

import pytest
import torch
from engine_runs import loaded
from torch.utils._python_dispatch import TorchDispatchMode

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import (
    AddVector,
    Comparison,
    Condition,
    Edit,
    EditKind,
    Gate,
    HeadEdit,
    LowRank,
    NeuronEdit,
    NeuronOp,
    Program,
    ProjectOut,
    ReplaceVector,
    RotateTowards,
    Vector,
)
from patchclamp_server.model.sites import Site

FAMILY = "llama"
ROWS = 64


class OperatorCount(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n += 1
        return func(*args, **(kwargs or {}))


def vector(seed: int) -> Vector:
    width = loaded(FAMILY).info.d_model
    return Vector(values=torch.randn(width, generator=torch.Generator().manual_seed(seed)))


def edits(seed: int) -> list[Edit]:
    """One edit of each kind, with numbers of its own."""
    info = loaded(FAMILY).info
    rank = 1 + seed % 3
    matrices = torch.randn(2, rank, info.d_model, generator=torch.Generator().manual_seed(seed))
    neurons = tuple((seed * 7 + i) % info.d_ff for i in range(1 + seed % 5))
    kinds: list[tuple[EditKind, Site]] = [
        (AddVector(vector(seed)), Site.RESID_POST),
        (ProjectOut(vector(seed + 1)), Site.RESID_PRE),
        (ReplaceVector(vector(seed + 2)), Site.MLP_OUT),
        (RotateTowards(vector(seed + 3), 0.1 + 0.01 * seed), Site.RESID_MID),
        (LowRank(matrices[0], matrices[1], torch.zeros(rank)), Site.ATTN_OUT),
        (NeuronEdit(neurons, op=NeuronOp.SET, values=(0.1 * seed,)), Site.MLP_POST),
        (HeadEdit((seed % info.n_heads,), scale=0.5), Site.ATTN_Z),
    ]
    return [Edit(kind, site, layers=(1, 2), strength=0.1 + 0.01 * seed) for kind, site in kinds]


def program(seed: int) -> Program:
    return Program(edits=tuple(edits(seed)))


def decode_operators(programs: Sequence[Program | None]) -> int:
    """Operators of one decode step of a batch in which row i runs programs[i]; plans are made anew in it."""
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=ROWS, max_tokens_per_step=1024))
    for i, each in enumerate(programs):
        bound = None if each is None else bind(each, loaded(FAMILY).info)
        stop = StopParams(max_tokens=8, ignore_eos=True)
        engine.submit(Request((3, 5 + i % 7, 9), on_event=lambda event: None, program=bound, stop=stop))
    assert engine.step()
    assert engine.scheduler.running
    assert all(s.remaining == 1 for s in engine.scheduler.running)
    counter = OperatorCount()
    with counter:
        engine.step()
    return counter.n


def test_64_programs_issue_as_many_operators_as_one() -> None:
    one = decode_operators([program(0)] + [None] * (ROWS - 1))
    assert decode_operators([program(seed) for seed in range(ROWS)]) == one
    assert one > decode_operators([None] * ROWS)


def test_the_number_of_rows_does_not_matter_either() -> None:
    assert decode_operators([program(seed) for seed in range(3)]) == decode_operators(
        [program(seed) for seed in range(ROWS)]
    )


def test_operators_grow_with_the_kinds_in_use() -> None:
    kinds = len(edits(0))
    counts = [
        decode_operators([Program(edits=tuple(edits(seed)[:n])) for seed in range(ROWS)]) for n in range(1, kinds + 1)
    ]
    assert counts == sorted(set(counts))


def test_programs_of_one_kind_each_cost_what_one_program_of_all_kinds_costs() -> None:
    kinds = len(edits(0))
    spread = [Program(edits=(edits(seed)[seed % kinds],)) for seed in range(ROWS)]
    together = [program(seed) for seed in range(ROWS)]
    assert decode_operators(spread) == decode_operators(together)


@pytest.mark.parametrize("latched", [False, True])
def test_gates_are_a_kind_too(latched: bool) -> None:
    def gated(seed: int) -> Program:
        condition = Condition(Site.RESID_PRE, 0, vector(seed), Comparison.ABOVE, 0.1 * seed)
        gate = Gate(condition, latched)
        return Program(edits=(Edit(AddVector(vector(seed)), Site.RESID_POST, layers=(1,), gate=gate),))

    one = decode_operators([gated(0)] + [None] * (ROWS - 1))
    assert decode_operators([gated(seed) for seed in range(ROWS)]) == one


def test_an_unchanged_batch_reuses_its_plan() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=ROWS))
    for seed in range(4):
        bound = bind(program(seed), loaded(FAMILY).info)
        engine.submit(
            Request((3, 5, 9), lambda event: None, program=bound, stop=StopParams(max_tokens=8, ignore_eos=True))
        )
    counts = []
    for _ in range(5):
        with OperatorCount() as counter:
            assert engine.step()
        counts.append(counter.n)
    assert counts[2] < counts[1]
    assert counts[2] == counts[3] == counts[4]
