"""The running state of one sequence's program: strengths over positions, latches, counters, and the fingerprints of
what it did to each block of tokens."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from patchclamp_server.errors import NotFound
from patchclamp_server.interventions.bound import BoundEdit, BoundProgram, Kind
from patchclamp_server.interventions.program import EditReceipt, Program, Receipt, Scope
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask, settled_mask
from patchclamp_server.interventions.tables import LoadedProgram
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.sites import Site

# Of |delta| / |h|; taking everything away, as an ablation of all heads does, is 1 and its rounding.
MOST_CHANGE = 1.001


@dataclass(eq=False)
class ProgramState:
    """A program while its sequence runs.

    `counted` is the first position whose rows have not been counted: recomputation after a preemption neither counts
    nor reads out again.
    """

    uid: int
    bound: BoundProgram
    sequence: SequenceTokens
    loaded: LoadedProgram
    counted: int = 0
    # Grows with every change of strength; plans made before it are stale.
    version: int = 0
    # For each edit, (position, strength) pairs: the strength from that position on.
    strengths: list[list[tuple[int, float]]] = field(default_factory=list)
    rows_from_cache: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.strengths = [[(0, e.strength)] for e in self.bound.edits]
        self.rows_from_cache = [0] * len(self.bound.edits)
        self.settled = self._settled()
        heads = [settled_mask(r.scope, self.sequence) for r in self.bound.head_readouts]
        self.heads_settled = None not in heads
        self.stages = _stages(self.bound.edits)

    def _settled(self) -> bool:
        """Whether every scope has one value for all generated tokens, so that plans can be reused."""
        scopes = [e.scope for e in self.bound.edits] + [r.scope for r in self.bound.readouts]
        scopes += [a.condition.scope for a in self.bound.aborts]
        scopes += [e.gate.scope for e in self.bound.edits if e.gate is not None]
        return all(settled_mask(scope, self.sequence) is not None for scope in scopes)

    def set_strength(self, name: str, strength: float, position: int) -> None:
        """`strength` holds for tokens at `position` and later. Raises NotFound for an unknown edit."""
        for i, edit in enumerate(self.bound.edits):
            if edit.name == name:
                history = [entry for entry in self.strengths[i] if entry[0] < position]
                self.strengths[i] = [*history, (position, strength)]
                self.version += 1
                return
        raise NotFound("set_strength.edit", f"the program has no edit named {name!r}")

    def strength_at(self, edit: int, positions: IntArray) -> np.ndarray:
        """Strengths [n] float32 of an edit at `positions` [n]."""
        history = self.strengths[edit]
        if len(history) == 1:
            return np.full(len(positions), history[0][1], dtype=np.float32)
        starts = [start for start, _ in history]
        return np.array([history[bisect_right(starts, p) - 1][1] for p in positions], dtype=np.float32)

    def edit_mask(self, edit: BoundEdit, positions: IntArray, token_ids: IntArray) -> BoolArray:
        return scope_mask(edit.scope, self.sequence, positions, token_ids)

    def first_unshareable(self, token_ids: IntArray) -> int:
        """Position from which blocks depend on more than their own tokens and edits: the state of a latch."""
        return self._first_in_scope([e.gate.scope for e in self.bound.edits if e.gate and e.latched], token_ids)

    def first_observed(self, token_ids: IntArray) -> int:
        """First position, of those not counted yet, at which something is read (a gate is): it must be computed."""
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
        """Digest of what the program does to a block of tokens; b"" when it touches none of them."""
        digest = None
        for i, edit in enumerate(self.bound.edits):
            if edit.latched:
                # Blocks are shared only before the first token its latch looks at, where it is closed.
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
        """Tokens [start, end) came from the prefix cache: the edits in scope were done by the request that filled it.

        Gated edits do not count: no token that a gate looks at is taken from the cache.
        """
        positions = np.arange(start, end, dtype=np.int64)
        for i, edit in enumerate(self.bound.edits):
            if edit.gate is not None:
                continue
            touched = int(self.edit_mask(edit, positions, token_ids[start:end]).sum())
            self.rows_from_cache[i] += touched * len(edit.layers)

    def receipt(self, counts: np.ndarray) -> Receipt:
        """`counts` [n_edits, 2]: rows touched, and the sum of their relative changes."""
        edits, warnings = [], []
        counted = zip(self.bound.edits, counts.tolist(), self.rows_from_cache, strict=True)
        for i, (edit, (rows, total), cached) in enumerate(counted):
            change = total / rows if rows else 0.0
            gated = int(rows) if edit.gate is not None else 0
            threshold = None if edit.gate is None else edit.gate.threshold
            edits.append(EditReceipt(edit.name, int(rows), change, gated, cached, threshold))
            if change > MOST_CHANGE:
                warnings.append(_strong_edit(i, edit.name, change))
        return Receipt(self.bound.fingerprint, tuple(edits), tuple(warnings))


def _strong_edit(index: int, name: str, change: float) -> RequestWarning:
    message = (
        f"edit {name!r} changed activations by {change:.0%} of their norm on average, which is more than there was "
        "to change; a lower strength leaves more of the text to the model"
    )
    return RequestWarning(WarningCode.STRONG_EDIT, f"program.edits[{index}]", message)


def _stages(edits: tuple[BoundEdit, ...]) -> list[dict[int, int]]:
    """Stage of each edit at each layer: edits of one stage and site commute, and stages run in order."""
    last: dict[tuple[Site, int], tuple[int, list[BoundEdit]]] = {}
    stages: list[dict[int, int]] = []
    for edit in edits:
        own = {}
        for layer in edit.layers:
            stage, members = last.get((edit.site, layer), (0, []))
            if members and not all(_commute(edit, other, layer) for other in members):
                stage, members = stage + 1, []
            last[(edit.site, layer)] = (stage, [*members, edit])
            own[layer] = stage
        stages.append(own)
    return stages


def _commute(a: BoundEdit, b: BoundEdit, layer: int) -> bool:
    if a.kind is not b.kind or a.preserve_norm or b.preserve_norm:
        return False
    if a.kind is Kind.ADD:
        return True
    if a.kind in (Kind.NEURONS, Kind.HEADS):
        return not set(a.payload[layer][0].tolist()) & set(b.payload[layer][0].tolist())
    return False


EMPTY_FINGERPRINT = "sha256:" + hashlib.sha256().hexdigest()
EMPTY_PROGRAM = BoundProgram(Program(), EMPTY_FINGERPRINT, (), (), ())
EMPTY_RECEIPT = Receipt(EMPTY_FINGERPRINT, ())
