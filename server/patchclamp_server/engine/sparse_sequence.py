"""Keeps the sparse inference of one sequence: which rows it selects for, what they must keep, and what came of it."""

from dataclasses import dataclass, field

import torch

from patchclamp_server.engine.quality_guard import GuardState
from patchclamp_server.engine.request import SparseInference, SparsityReport
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.columns import EntryKind
from patchclamp_server.interventions.program import LogitLensReadout, NeuronReadout
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
    # The guard sets it when it falls back.
    dense_from: int | None = None
    _state: SequenceState = field(default_factory=SequenceState)
    _prompt_ended: bool = False
    # These are the neurons that watches keep, and those together with `forced`.
    _watched: Forced = field(default_factory=dict)
    _kept: Forced | None = None
    # This counts the sparse rows since `begin`.
    _rows: int = 0

    @classmethod
    def of(cls, asked: SparseInference, program: BoundProgram | None, prompt_length: int) -> "SparseSequence":
        guard = None if asked.guard is None else GuardState(asked.guard)
        return cls(asked, prompt_length, {} if program is None else forced_by(program), guard)

    def begin(self) -> None:
        self._state, self._prompt_ended, self._rows = self.asked.selector.begin(), False, 0

    @property
    def reusable_until(self) -> int:
        """Returns the position before which tokens may come from the prefix cache: dense ones that the policy need not
        see."""
        return 0 if self.asked.selector.observes_prompt else self.prompt_length

    def next_boundary(self, position: int) -> int | None:
        """Returns where rows after `position` begin to be computed otherwise; a chunk does not cross it."""
        boundaries = (self.prompt_length, self.dense_from)
        return min((b for b in boundaries if b is not None and b > position), default=None)

    def is_sparse(self, position: int) -> bool:
        return position >= self.prompt_length and (self.dense_from is None or position < self.dense_from)

    def rows(self, row: int, position: int, n: int, watched: Forced) -> Rows | None:
        """Returns the next n tokens, from `position` on, as rows of a step, or None where they are dense and no policy
        sees them.

        `watched` are neurons kept besides those of the program; it is the same object from step to step.
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
            # The sets of the sequence contain the neurons of the watches before.
            self._state.fixed.clear()
        return self._kept

    def report(self, computed: int) -> SparsityReport:
        """Returns the report; `computed` is the number of tokens of the sequence that were computed."""
        end = computed if self.dense_from is None else min(computed, self.dense_from)
        sparse = max(0, end - self.prompt_length)
        by_layer = {layer: 1.0 - dropped / self._rows for layer, dropped in self._state.dropped().items()}
        dropped = sum(1.0 - share for share in by_layer.values())
        return SparsityReport(
            policy=self.asked.policy,
            profile=self.asked.profile,
            sparse_tokens=sparse,
            dense_tokens=max(0, computed - self.prompt_length) - sparse,
            active_ratio=1.0 - dropped / self.asked.selector.model.n_layers,
            guard=None if self.guard is None else self.guard.report(self.dense_from),
            filled_ratio=self._state.filled_ratio,
            active_by_layer=by_layer,
        )


def union(a: Forced, b: Forced) -> Forced:
    """Returns the neurons of either; None, which is all of a layer, where either says so."""
    layers = dict(a)
    for layer, neurons in b.items():
        own = a.get(layer, NO_NEURONS)
        layers[layer] = None
        if own is not None and neurons is not None:
            layers[layer] = forced_neurons(own.tolist(), neurons.tolist())
    return layers


def forced_by(program: BoundProgram) -> Forced:
    """Returns the neurons that a program edits or reads, at whichever of their sites. What is not about single neurons,
    such as a direction, needs all of them."""
    named: dict[int, list[list[int]]] = {}
    every: set[int] = set()
    for edit in program.edits:
        if edit.gate is not None and edit.gate.site in NEURON_SITES:
            every.add(edit.gate.layer)
        # What an edit reads at an earlier site, such as the input of a transcoder, depends on all of them too.
        if edit.input is not None and edit.input.site in NEURON_SITES:
            every.update(edit.input.layers)
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
            if readout.kind in (NeuronReadout, LogitLensReadout):
                named.setdefault(layer, []).append(list(readout.ids))
            else:
                every.add(layer)
    for abort in program.aborts:
        if abort.condition.site in NEURON_SITES:
            every.add(abort.condition.layer)
    forced: dict[int, torch.Tensor | None] = {layer: forced_neurons(*sets) for layer, sets in named.items()}
    return forced | dict.fromkeys(every)
