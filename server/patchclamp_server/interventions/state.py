"""The running state of one sequence's program: strengths over positions, latches, counters, and the fingerprints of
what it did to each block of tokens."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from patchclamp_server.errors import NotFound
from patchclamp_server.interventions.bound import BoundEdit, BoundProgram
from patchclamp_server.interventions.program import EditReceipt, Program, Receipt, Scope
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.interventions.safe_strengths import beyond_safe_range
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask, settled_mask
from patchclamp_server.interventions.tables import NEVER, LoadedProgram, Tables
from patchclamp_server.model.arrays import BoolArray, IntArray

# This bounds |delta| / |h|. Removing everything, as an ablation of all heads does, is 1 up to rounding.
MOST_CHANGE = 1.001


@dataclass(eq=False)
class ProgramState:
    """A program while its sequence runs.

    `counted` is the first position whose rows have not been counted: a recomputation after a preemption neither counts
    nor reads out again.
    """

    uid: int
    bound: BoundProgram
    sequence: SequenceTokens
    loaded: LoadedProgram
    counted: int = 0
    # It grows with every change of strength; plans made before are then stale.
    version: int = 0
    # Each edit has (position, strength) pairs: the strength holds from that position on.
    strengths: list[list[tuple[int, float]]] = field(default_factory=list)
    rows_from_cache: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.strengths = [[(0, e.strength)] for e in self.bound.edits]
        self.rows_from_cache = [0] * len(self.bound.edits)
        # From this position on every token finds the same entries in scope and the same strengths.
        self.steady_from = self.sequence.prompt_length if self._settled() else NEVER
        heads = [settled_mask(r.scope, self.sequence) for r in self.bound.head_readouts]
        self.heads_settled = None not in heads

    def _settled(self) -> bool:
        """Whether every scope has one value for all generated tokens, so that plans can be reused."""
        scopes = [e.scope for e in self.bound.edits] + [r.scope for r in self.bound.readouts]
        scopes += [a.condition.scope for a in self.bound.aborts]
        scopes += [e.gate.scope for e in self.bound.edits if e.gate is not None]
        return all(settled_mask(scope, self.sequence) is not None for scope in scopes)

    def set_strength(self, name: str, strength: float, position: int) -> None:
        """Sets the `strength` of an edit for tokens at `position` and later. Raises NotFound for an unknown edit."""
        for i, edit in enumerate(self.bound.edits):
            if edit.name == name:
                history = [entry for entry in self.strengths[i] if entry[0] < position]
                self.strengths[i] = [*history, (position, strength)]
                self.steady_from = max(self.steady_from, position)
                self.version += 1
                return
        raise NotFound("set_strength.edit", f"the program has no edit named {name!r}")

    def slots(self, tables: Tables, positions: IntArray) -> IntArray:
        """Returns the slots [n] of the program at `positions` [n]."""
        starts = sorted({start for history in self.strengths for start, _ in history} | {0})
        which = np.searchsorted(np.array(starts), positions, side="right") - 1
        slots = np.zeros(len(starts), dtype=np.int64)
        for i in np.unique(which).tolist():
            at = np.array([starts[i]], dtype=np.int64)
            strengths = [self.strength_at(edit, at)[0] for edit in range(len(self.strengths))]
            slots[i] = tables.slot(self.loaded, starts[i], np.array(strengths, dtype=np.float32))
        chosen: IntArray = slots[which]
        return chosen

    @cached_property
    def settled_masks(self) -> IntArray:
        """Returns the masks [1, words] that every generated token has where all scopes are settled."""
        end = np.array([self.sequence.prompt_length], dtype=np.int64)
        return self.loaded.layout.masks(self.sequence, end, np.zeros(1, dtype=np.int64))

    def strength_at(self, edit: int, positions: IntArray) -> np.ndarray:
        """Returns the strengths [n] float32 of an edit at `positions` [n]."""
        history = self.strengths[edit]
        if len(history) == 1:
            return np.full(len(positions), history[0][1], dtype=np.float32)
        starts = [start for start, _ in history]
        return np.array([history[bisect_right(starts, p) - 1][1] for p in positions], dtype=np.float32)

    def edit_mask(self, edit: BoundEdit, positions: IntArray, token_ids: IntArray) -> BoolArray:
        return scope_mask(edit.scope, self.sequence, positions, token_ids)

    def first_unshareable(self, token_ids: IntArray) -> int:
        """Returns the position from which blocks depend on the state of a latch, not on their tokens and edits
        alone."""
        return self._first_in_scope([e.gate.scope for e in self.bound.edits if e.gate and e.latched], token_ids)

    def first_observed(self, token_ids: IntArray) -> int:
        """Returns the first uncounted position that a readout, an abort condition or a gate reads: it must be
        computed."""
        scopes = [r.scope for r in self.bound.readouts] + [a.condition.scope for a in self.bound.aborts]
        scopes += [e.gate.scope for e in self.bound.edits if e.gate is not None]
        return self._first_in_scope(scopes, token_ids, start=self.counted)

    def _first_in_scope(self, scopes: list[Scope], token_ids: IntArray, start: int = 0) -> int:
        first = len(token_ids)
        positions = np.arange(len(token_ids), dtype=np.int64)
        for scope in scopes:
            mask = scope_mask(scope, self.sequence, positions, token_ids)
            mask[:start] = False
            if mask.any():
                first = min(first, int(mask.argmax()))
        return first

    def touched_digest(self, positions: IntArray, token_ids: IntArray) -> bytes:
        """Returns a digest of what the program does to a block of tokens, or b"" when it touches none of them."""
        digest = None
        for i, edit in enumerate(self.bound.edits):
            if edit.latched:
                # Blocks are shared only before the first token that its latch looks at, and there the latch is closed.
                continue
            mask = self.edit_mask(edit, positions, token_ids)
            if edit.gate is not None:
                mask &= scope_mask(edit.gate.scope, self.sequence, positions, token_ids)
            if not mask.any():
                continue
            digest = digest or hashlib.sha256()
            digest.update(edit.fingerprint + mask.tobytes() + self.strength_at(i, positions[mask]).tobytes())
        return digest.digest() if digest is not None else b""

    def count_cached(self, start: int, end: int, token_ids: IntArray) -> None:
        """Counts the edits in scope of tokens [start, end) from the prefix cache: the request that filled it did them.

        Gated edits do not count, because no token that a gate looks at is taken from the cache.
        """
        positions = np.arange(start, end, dtype=np.int64)
        for i, edit in enumerate(self.bound.edits):
            if edit.gate is not None:
                continue
            touched = int(self.edit_mask(edit, positions, token_ids[start:end]).sum())
            self.rows_from_cache[i] += touched * len(edit.layers)

    def receipt(self, counts: np.ndarray) -> Receipt:
        """Returns the receipt. `counts` [n_edits, 2] has the rows touched, and the sum of their relative changes."""
        edits = []
        warnings: list[RequestWarning] = []
        counted = zip(self.bound.edits, counts.tolist(), self.rows_from_cache, strict=True)
        for i, (edit, (rows, total), cached) in enumerate(counted):
            change = total / rows if rows else 0.0
            gated = int(rows) if edit.gate is not None else 0
            threshold = None if edit.gate is None else edit.gate.shown_threshold
            edits.append(EditReceipt(edit.name, int(rows), change, gated, cached, threshold))
            if change > MOST_CHANGE:
                warnings.append(_strong_edit(i, edit.name, change))
            warnings += beyond_safe_range(i, edit.name, edit.safe, (strength for _, strength in self.strengths[i]))
        return Receipt(self.bound.fingerprint, tuple(edits), (*self.bound.warnings, *warnings))


def _strong_edit(index: int, name: str, change: float) -> RequestWarning:
    message = (
        f"edit {name!r} changed activations by {change:.0%} of their norm on average, which is more than there was "
        "to change; a lower strength leaves more of the text to the model"
    )
    return RequestWarning(WarningCode.STRONG_EDIT, f"program.edits[{index}]", message)


EMPTY_FINGERPRINT = "sha256:" + hashlib.sha256().hexdigest()
EMPTY_PROGRAM = BoundProgram(Program(), EMPTY_FINGERPRINT, (), (), ())
EMPTY_RECEIPT = Receipt(EMPTY_FINGERPRINT, ())
