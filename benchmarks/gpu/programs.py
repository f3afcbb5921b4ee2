"""Intervention programs over random vectors, and tables of them as a step has them."""

import math

import numpy as np
import torch
from torch import Tensor

from gpu.models import model_info
from gpu.setting import Shape
from patchclamp_kernels.program_table import ProgramRows
from patchclamp_kernels.residual_edits import ProgramStep
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    Gate,
    LowRank,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    Phase,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    TokenSelector,
    Vector,
)
from patchclamp_server.interventions.scopes import SequenceTokens
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.interventions.state import ProgramState
from patchclamp_server.model.sites import Site

# Prompts of the runs that are compared are the same tokens, unedited, so that the prefix cache holds them.
GENERATED = Scope((TokenSelector(phase=Phase.GENERATED),))
RANK = 4


def _vector(shape: Shape, seed: int) -> Vector:
    values = torch.randn(shape.d_model, generator=torch.Generator().manual_seed(seed))
    return Vector(values=values / math.sqrt(shape.d_model))


def add_program(shape: Shape, seed: int, layers: tuple[int, ...], scope: Scope = GENERATED) -> BoundProgram:
    """One vector added to the residual stream behind each of `layers`."""
    edit = Edit(AddVector(_vector(shape, seed)), Site.RESID_POST, layers=layers, strength=0.5, scope=scope)
    return _bound(shape, Program(edits=(edit,)))


def mixed_program(shape: Shape, seed: int, layers: tuple[int, ...], reads: bool = True) -> BoundProgram:
    """The seed picks a kind of edit (all residual kinds there are, gates and norm preservation) and its numbers.

    `reads`: every third has a projection readout too.
    """
    vector = _vector(shape, seed)
    matrices = torch.randn(2, RANK, shape.d_model, generator=torch.Generator().manual_seed(seed))
    matrices /= math.sqrt(shape.d_model)
    kinds = [
        (AddVector(vector), {}),
        (ProjectOut(vector), {}),
        (CapProjection(vector, max=0.1), {}),
        (SetProjection(vector, 0.5), {}),
        (ReplaceVector(vector), {"strength": 0.05}),
        (RotateTowards(vector, 0.1), {}),
        (LowRank(matrices[0], matrices[1], torch.zeros(RANK)), {"strength": 0.5}),
        (AddVector(vector), {"preserve_norm": True}),
        (AddVector(vector), {"gate": True}),
    ]
    kind, options = kinds[seed % len(kinds)]
    if options.get("gate"):
        condition = Condition(Site.MLP_OUT, layers[0], _vector(shape, seed + 1), Comparison.ABOVE, 0.0)
        options = {"gate": Gate(condition)}
    edit = Edit(kind, Site.RESID_POST, layers=layers, scope=GENERATED, **options)
    readouts = ()
    if reads and seed % 3 == 0:
        readouts = (Readout(ProjectionReadout((vector,)), Site.RESID_POST, layers=layers[:1], scope=GENERATED),)
    return _bound(shape, Program(edits=(edit,), readouts=readouts))


def clamp_program(shape: Shape, seed: int, neurons: int, layers: tuple[int, ...], read: bool = False) -> BoundProgram:
    """`neurons` neurons of each layer clamped to [-0.5, 0.5]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = tuple(sorted(torch.randperm(shape.d_ff, generator=generator)[:neurons].tolist()))
    kind = NeuronEdit(chosen, op=NeuronOp.CLAMP, min=-0.5, max=0.5)
    edit = Edit(kind, Site.MLP_POST, layers=layers, scope=GENERATED)
    readouts = ()
    if read:
        readouts = (Readout(NeuronReadout(chosen[:5]), Site.MLP_POST, layers=layers[:1], scope=GENERATED),)
    return _bound(shape, Program(edits=(edit,), readouts=readouts))


def readout_program(shape: Shape, seed: int, layers: tuple[int, ...]) -> BoundProgram:
    """One projection at each of `layers`, streamed with every generated token."""
    readout = Readout(ProjectionReadout((_vector(shape, seed),)), Site.RESID_POST, layers=layers, scope=GENERATED)
    return _bound(shape, Program(readouts=(readout,)))


def _bound(shape: Shape, program: Program) -> BoundProgram:
    return bind(program, model_info(shape, torch.bfloat16, torch.device("cpu")))


class StepTables:
    """The tables of a step of one generated token a program; None is a row without one."""

    def __init__(
        self, shape: Shape, programs: list[BoundProgram | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.device, self.n = shape, device, len(programs)
        self.tables = SlotTables(shape.n_layers, dtype, device)
        slots, masks = np.full(self.n, -1, dtype=np.int32), np.zeros((self.n, 1), dtype=np.int64)
        self.columns, self.items, self.readings = 1, 1, 1
        at, token = np.array([1], dtype=np.int64), np.zeros(1, dtype=np.int64)
        for row, program in enumerate(programs):
            if program is None:
                continue
            state = ProgramState(row, program, SequenceTokens(1, None), self.tables.load(program))
            slots[row] = self.tables.slots(state, at)[0]
            layout = self.tables.written(state).layout
            masks[row] = layout.masks(state.sequence, at, token)[0]
            self.columns = max(self.columns, layout.n_columns)
            self.items = max(self.items, len(layout.scopes))
            self.readings = max(self.readings, layout.n_readings)
        self.slots, self.masks = torch.from_numpy(slots).to(device), torch.from_numpy(masks).to(device)

    def rows(self) -> ProgramRows:
        """New outputs each time, as a step has them."""
        device = self.device
        return ProgramRows(
            slot=self.slots,
            mask=self.masks,
            position=torch.ones(self.n, dtype=torch.int64, device=device),
            counted=torch.ones(self.n, dtype=torch.int32, device=device),
            opened=torch.zeros(self.n, self.columns, dtype=torch.int32, device=device),
            receipts=torch.zeros(self.n, self.items, 2, device=device),
            readings=torch.zeros(self.n, self.readings, device=device),
        )

    def step(self, rows: ProgramRows, wide: bool = False) -> ProgramStep:
        """`wide`: banks in float64, for the reference."""

        def bank(width: int) -> Tensor:
            data = self.tables.bank(width).data
            return data.double() if wide else data

        shape = self.shape
        return ProgramStep(self.tables.table, rows, bank(shape.d_model), bank(shape.head_dim), shape.head_dim)
