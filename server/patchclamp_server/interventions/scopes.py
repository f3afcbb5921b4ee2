"""Finds the tokens that a scope selects: checks it for contradictions, and masks a span of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import Phase, PositionRange, Scope, TokenSelector
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.text.vocabulary import check_ids

# The turn that the model itself writes has this role.
GENERATED_ROLE = "assistant"

Int32Array = NDArray[np.int32]
FloatArray = np.ndarray


def check_scope(scope: Scope, path: str, *, vocab_size: int, has_roles: bool) -> None:
    """Refuses a scope that cannot match any token of any sequence. Raises InvalidArgument."""
    for part, selectors in (("include", scope.include), ("exclude", scope.exclude)):
        for i, selector in enumerate(selectors):
            _check_selector(selector, f"{path}.{part}[{i}]", vocab_size=vocab_size, has_roles=has_roles)
    if scope.include:
        covered = all(any(_implies(a, b) for b in scope.exclude) for a in scope.include)
    else:
        covered = any(b == TokenSelector() for b in scope.exclude)
        covered |= all(TokenSelector(phase=phase) in scope.exclude for phase in Phase)
    if covered:
        raise InvalidArgument(f"{path}.exclude", "contradictory scope: everything that is included is excluded")


def _check_selector(selector: TokenSelector, path: str, *, vocab_size: int, has_roles: bool) -> None:
    generated_only = selector.phase is Phase.GENERATED
    if selector.last_k is not None:
        if selector.last_k < 1:
            raise InvalidArgument(f"{path}.last_k", "must be at least 1")
        if generated_only:
            raise InvalidArgument(f"{path}.last_k", "contradictory scope: counts prompt tokens, phase is GENERATED")
    if selector.role is not None:
        if not has_roles:
            raise InvalidArgument(f"{path}.role", "roles need a prompt of chat messages (or the template hides them)")
        if generated_only and selector.role != GENERATED_ROLE:
            message = f"contradictory scope: generated tokens have the role {GENERATED_ROLE!r}"
            raise InvalidArgument(f"{path}.role", message)
    if selector.positions is not None:
        _check_range(selector.positions, f"{path}.positions", selector.phase)
    check_ids(selector.token_ids, vocab_size, f"{path}.token_ids")


def _check_range(positions: PositionRange, path: str, phase: Phase | None) -> None:
    start, end = positions.start, positions.end
    if end is not None:
        # Only two absolute or two relative ends can be compared; 0 after a negative start is the end of the prompt.
        same_frame = (start < 0 and end < 0) or (start >= 0 and end >= 0)
        if same_frame and start >= end:
            raise InvalidArgument(path, f"contradictory scope: the range [{start}, {end}) is empty")
        if phase is Phase.GENERATED and (end < 0 or (end == 0 and start < 0)):
            raise InvalidArgument(path, "contradictory scope: the range ends in the prompt, phase is GENERATED")


def _implies(a: TokenSelector, b: TokenSelector) -> bool:
    """Whether every token that matches `a` matches `b`."""
    return (
        b.phase in (None, a.phase)
        and b.positions in (None, a.positions)
        and (b.last_k is None or (a.last_k is not None and a.last_k <= b.last_k))
        and (not b.token_ids or (bool(a.token_ids) and set(a.token_ids) <= set(b.token_ids)))
        and b.role in (None, a.role)
    )


@dataclass(frozen=True, eq=False)
class SequenceTokens:
    """What a scope needs to know of a sequence. `roles` covers the prompt."""

    prompt_length: int
    roles: tuple[str, ...] | None


def scope_mask(scope: Scope, sequence: SequenceTokens, positions: IntArray, token_ids: IntArray) -> BoolArray:
    """Returns the mask [n] over tokens `token_ids` [n] at `positions` [n]."""
    if not scope.include and not scope.exclude:
        return np.ones(len(positions), dtype=np.bool_)
    mask = np.zeros(len(positions), dtype=np.bool_)
    if not scope.include:
        mask[:] = True
    for selector in scope.include:
        mask |= _selector_mask(selector, sequence, positions, token_ids)
    for selector in scope.exclude:
        mask &= ~_selector_mask(selector, sequence, positions, token_ids)
    return mask


def prompt_mask(scope: Scope, tokens: Sequence[int], roles: tuple[str, ...] | None) -> BoolArray:
    """Returns the mask [n] over the tokens of a prompt [n], of which there is nothing but the prompt."""
    ids = np.array(tokens, dtype=np.int64)
    return scope_mask(scope, SequenceTokens(len(ids), roles), np.arange(len(ids), dtype=np.int64), ids)


def _selector_mask(
    selector: TokenSelector, sequence: SequenceTokens, positions: IntArray, token_ids: IntArray
) -> BoolArray:
    prompt = sequence.prompt_length
    mask = np.ones(len(positions), dtype=np.bool_)
    if selector.phase is not None:
        mask &= (positions < prompt) if selector.phase is Phase.PROMPT else (positions >= prompt)
    if selector.positions is not None:
        start, end = selector.positions.start, selector.positions.end
        mask &= positions >= (start if start >= 0 else prompt + start)
        if end is not None:
            # An end of 0 after a negative start is the end of the prompt.
            mask &= positions < (end if end > 0 else prompt + end)
    if selector.last_k is not None:
        mask &= (positions >= prompt - selector.last_k) & (positions < prompt)
    if selector.token_ids:
        mask &= np.array([id in selector.token_set for id in token_ids.tolist()], dtype=np.bool_)
    if selector.role is not None:
        roles = sequence.roles or ()
        own = [(roles[p] if p < len(roles) else GENERATED_ROLE) == selector.role for p in positions]
        mask &= np.array(own, dtype=np.bool_)
    return mask


def settled_mask(scope: Scope, sequence: SequenceTokens) -> bool | None:
    """Returns the value that the mask has at every generated token, or None when it depends on the token."""
    values = [_settled(selector, sequence) for selector in scope.include] or [True]
    excluded = [_settled(selector, sequence) for selector in scope.exclude]
    if True in excluded:
        return False
    if None in values and True not in values:
        return None
    if None in excluded:
        return None if any(values) or None in values else False
    return True in values


def _settled(selector: TokenSelector, sequence: SequenceTokens) -> bool | None:
    other_role = selector.role is not None and selector.role != GENERATED_ROLE
    if selector.phase is Phase.PROMPT or selector.last_k is not None or other_role:
        return False
    if selector.positions is not None:
        start, end = selector.positions.start, selector.positions.end
        if end is not None and (end <= 0 or end <= sequence.prompt_length):
            return False
        if end is not None or start > sequence.prompt_length:
            return None
    return None if selector.token_ids else True
