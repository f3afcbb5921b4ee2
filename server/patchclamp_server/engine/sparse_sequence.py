"""Sparse inference of one sequence: which of its rows are selected for, what they must keep, and what came of it."""

from dataclasses import dataclass, field

import torch

from patchclamp_server.engine.quality_guard import GuardState
from patchclamp_server.engine.request import SparseInference, SparsityReport
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.columns import EntryKind
from patchclamp_server.interventions.program import NeuronReadout
from patchclamp_server.model.sites import NEURON_SITES
from patchclamp_server.sparsity.apply import NO_NEURONS, Forced, Rows, forced_neurons
from patchclamp_server.sparsity.policy import SequenceState


@dataclass(eq=False)
class SparseSequence:
    """Tokens in [prompt_length, dense_from) are computed by the policy, all others densely.

    What a policy makes of a prompt is made again when the sequence is preempted: `begin` stands at every admission.
    """

    asked: SparseInference
    prompt_length: int
    forced: Forced
    guard: GuardState | None
    # Set by the guard when it falls back.
    dense_from: int | None = None
    _state: SequenceState = field(default_factory=SequenceState)
    _prompt_ended: bool = False
    # Neurons that watches keep, and those together with `forced`.
    _watched: Forced = field(default_factory=dict)
    _kept: Forced | None = None
    # Sparse rows since `begin`.
    _rows: int = 0

    @classmethod
    def of(cls, asked: SparseInference, program: BoundProgram | None, prompt_length: int) -> "SparseSequence":
        guard = None if asked.guard is None else GuardState(asked.guard)
        return cls(asked, prompt_length, {} if program is None else forced_by(program), guard)

    def begin(self) -> None:
        self._state, self._prompt_ended, self._rows = self.asked.selector.begin(), False, 0

    @property
    def reusable_until(self) -> int:
        """Tokens before this position may come from the prefix cache: dense ones that the policy need not see."""
        return 0 if self.asked.selector.observes_prompt else self.prompt_length

    def next_boundary(self, position: int) -> int | None:
        """Where rows after `position` begin to be computed otherwise; a chunk does not cross it."""
        boundaries = (self.prompt_length, self.dense_from)
        return min((b for b in boundaries if b is not None and b > position), default=None)

    def is_sparse(self, position: int) -> bool:
        return position >= self.prompt_length and (self.dense_from is None or position < self.dense_from)

    def rows(self, row: int, position: int, n: int, watched: Forced) -> Rows | None:
        """The next n tokens, from `position` on, as rows of a step; None where they are dense and nobody's to see.

        `watched`: neurons that are kept besides those of the program; the same object from step to step.
        """
        rows = slice(row, row + n)
        selector = self.asked.selector
        if position < self.prompt_length:
            return Rows(rows, selector, self._state, prompt=True) if selector.observes_prompt else None
        if not self.is_sparse(position):
            return None
        if not self._prompt_ended:
            selector.end_prompt(self._state)
            self._prompt_ended = True
        self._rows += n
        return Rows(rows, selector, self._state, forced=self._keep(watched))

    def _keep(self, watched: Forced) -> Forced:
        if self._kept is None or watched is not self._watched:
            self._kept, self._watched = union(self.forced, watched), watched
            # Sets of the sequence have the neurons of the watches before in them.
            self._state.fixed.clear()
        return self._kept

    def report(self, computed: int) -> SparsityReport:
        """`computed`: tokens of the sequence that were."""
        end = computed if self.dense_from is None else min(computed, self.dense_from)
        sparse = max(0, end - self.prompt_length)
        blocks = self._rows * self.asked.selector.model.n_layers
        dropped = self._state.selected - float(self._state.active)
        return SparsityReport(
            policy=self.asked.policy,
            profile=self.asked.profile,
            sparse_tokens=sparse,
            dense_tokens=max(0, computed - self.prompt_length) - sparse,
            active_ratio=1.0 - dropped / blocks if blocks else 1.0,
            guard=None if self.guard is None else self.guard.report(self.dense_from),
            filled_ratio=self._state.filled_ratio,
        )


def union(a: Forced, b: Forced) -> Forced:
    """Neurons of either; all of a layer where either says so."""
    layers = dict(a)
    for layer, neurons in b.items():
        own = a.get(layer, NO_NEURONS)
        layers[layer] = None
        if own is not None and neurons is not None:
            layers[layer] = forced_neurons(own.tolist(), neurons.tolist())
    return layers


def forced_by(program: BoundProgram) -> Forced:
    """Neurons that a program edits or reads, at whichever of their sites. What is not about single neurons, such as a
    direction, needs them all."""
    named: dict[int, list[list[int]]] = {}
    every: set[int] = set()
    for edit in program.edits:
        if edit.gate is not None and edit.gate.site in NEURON_SITES:
            every.add(edit.gate.layer)
        if edit.site not in NEURON_SITES:
            continue
        for layer in edit.layers:
            if edit.kind is EntryKind.NEURONS:
                named.setdefault(layer, []).append(edit.payload[layer][0].tolist())
            else:
                every.add(layer)
    for readout in program.readouts:
        if readout.site not in NEURON_SITES:
            continue
        for layer in readout.layers:
            if readout.kind is NeuronReadout:
                named.setdefault(layer, []).append(list(readout.ids))
            else:
                every.add(layer)
    for abort in program.aborts:
        if abort.condition.site in NEURON_SITES:
            every.add(abort.condition.layer)
    forced: dict[int, torch.Tensor | None] = {layer: forced_neurons(*sets) for layer, sets in named.items()}
    return forced | dict.fromkeys(every)
