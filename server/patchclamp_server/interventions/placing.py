"""Patches find their tokens here: positions that count from the end of a prompt become positions of this one.

Nothing else of a program depends on the length of the prompt but scopes, which are asked token by token. The scope of a
placed patch selects no token that it has no row for, so that whatever asks a scope, also receipts and the keys of the
prefix cache, knows what the patch touches.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from patchclamp_server.interventions.bound import BoundEdit, BoundProgram
from patchclamp_server.interventions.columns import EntryKind
from patchclamp_server.interventions.program import PositionRange, Scope, TokenSelector


def placed(program: BoundProgram, prompt_length: int) -> BoundProgram:
    """Returns the program as it is for a prompt of that length. Of positions that fall onto one token the later listed
    one holds; those before the prompt touch nothing."""
    if all(edit.kind is not EntryKind.PATCH for edit in program.edits):
        return program
    edits = (_placed(edit, prompt_length) if edit.kind is EntryKind.PATCH else edit for edit in program.edits)
    return replace(program, edits=tuple(edits))


def _placed(edit: BoundEdit, prompt_length: int) -> BoundEdit:
    given = edit.payload[edit.layers[0]][0].tolist()
    row_of = {position if position >= 0 else prompt_length + position: i for i, position in enumerate(given)}
    positions = sorted(position for position in row_of if position >= 0)
    own = torch.tensor(positions, dtype=torch.int64)
    chosen = torch.tensor([row_of[position] for position in positions], dtype=torch.int64)
    payload = {layer: (own, rows.index_select(0, chosen), mask) for layer, (_, rows, mask) in edit.payload.items()}
    scope = Scope(edit.scope.include, (*edit.scope.exclude, *_all_but(positions)))
    # The same tokens in a longer prompt may get other rows.
    rows_of_tokens = repr((positions, chosen.tolist())).encode()
    digest = hashlib.sha256(edit.fingerprint + rows_of_tokens).digest()
    return replace(edit, payload=payload, scope=scope, fingerprint=digest)


def _all_but(positions: Sequence[int]) -> tuple[TokenSelector, ...]:
    """Returns selectors of all tokens but those at ascending positions."""
    starts = [0, *(position + 1 for position in positions)]
    gaps = [(start, end) for start, end in zip(starts, positions, strict=False) if start < end]
    return tuple(TokenSelector(positions=PositionRange(*gap)) for gap in (*gaps, (starts[-1], None)))
