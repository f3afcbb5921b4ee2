"""Which tokens a scope selects, and what is known of it before the tokens are there."""

import numpy as np
import pytest
from engine_runs import Job, assert_same, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_formulas import in_scope
from programs import edit, prompt, shapes

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import Phase, PositionRange, Program, Scope, TokenSelector
from patchclamp_server.interventions.scopes import SequenceTokens, check_scope, scope_mask, settled_mask
from patchclamp_server.model.sites import Site

PROMPT_LENGTH, GENERATED_TOKENS, VOCABULARY = 6, 8, 4
ROLES = ("system", "system", "user", "user", "assistant", "assistant")

RANGES = st.builds(PositionRange, st.integers(-8, 12), st.none() | st.integers(-8, 16))
SELECTORS = st.builds(
    TokenSelector,
    phase=st.none() | st.sampled_from(Phase),
    positions=st.none() | RANGES,
    last_k=st.none() | st.integers(1, 8),
    token_ids=st.just(()) | st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=2).map(tuple),
    role=st.none() | st.sampled_from(["system", "user", "assistant"]),
)


def is_accepted(scope: Scope) -> bool:
    try:
        check_scope(scope, "scope", vocab_size=VOCABULARY, has_roles=True)
    except InvalidArgument:
        return False
    return True


SCOPES = st.builds(
    Scope, st.lists(SELECTORS, max_size=2).map(tuple), st.lists(SELECTORS, max_size=2).map(tuple)
).filter(is_accepted)


@given(SCOPES, st.lists(st.integers(0, VOCABULARY - 1), min_size=GENERATED_TOKENS, max_size=GENERATED_TOKENS))
@settings(deadline=None, max_examples=400)
def test_what_is_settled_holds_at_every_generated_token(scope: Scope, token_ids: list[int]) -> None:
    sequence = SequenceTokens(PROMPT_LENGTH, ROLES)
    settled = settled_mask(scope, sequence)
    positions = np.arange(PROMPT_LENGTH, PROMPT_LENGTH + GENERATED_TOKENS, dtype=np.int64)
    if settled is not None:
        assert set(scope_mask(scope, sequence, positions, np.array(token_ids, dtype=np.int64)).tolist()) == {settled}


@given(SCOPES, st.lists(st.integers(0, VOCABULARY - 1), min_size=14, max_size=14))
@settings(deadline=None, max_examples=200)
def test_the_mask_of_a_scope_is_that_of_the_oracle(scope: Scope, token_ids: list[int]) -> None:
    positions = np.arange(len(token_ids), dtype=np.int64)
    found = scope_mask(scope, SequenceTokens(PROMPT_LENGTH, ROLES), positions, np.array(token_ids, dtype=np.int64))
    assert found.tolist() == [in_scope(scope, p, tuple(token_ids), PROMPT_LENGTH, ROLES) for p in positions.tolist()]


@pytest.mark.parametrize(
    ("scope", "settled"),
    [
        (Scope(), True),
        (Scope((TokenSelector(phase=Phase.GENERATED),)), True),
        (Scope((TokenSelector(phase=Phase.PROMPT),)), False),
        (Scope((TokenSelector(last_k=3),)), False),
        (Scope((TokenSelector(positions=PositionRange(2)),)), True),
        (Scope((TokenSelector(positions=PositionRange(PROMPT_LENGTH)),)), True),
        (Scope((TokenSelector(positions=PositionRange(2, PROMPT_LENGTH)),)), False),
        (Scope((TokenSelector(role="user"),)), False),
        (Scope((TokenSelector(role="assistant"),)), True),
        (Scope((), (TokenSelector(last_k=3),)), True),
    ],
)
def test_a_scope_that_no_generated_token_changes_is_settled(scope: Scope, settled: bool) -> None:
    """Otherwise its mask would be made again at every token."""
    assert settled_mask(scope, SequenceTokens(PROMPT_LENGTH, ROLES)) is settled


@pytest.mark.parametrize(
    "scope",
    [
        Scope((TokenSelector(positions=PositionRange(2, PROMPT_LENGTH + 3)),)),
        Scope((TokenSelector(positions=PositionRange(PROMPT_LENGTH + 1)),)),
        Scope((TokenSelector(phase=Phase.GENERATED, positions=PositionRange(-2, PROMPT_LENGTH + 3)),)),
        Scope((), (TokenSelector(positions=PositionRange(0, PROMPT_LENGTH + 3)),)),
        Scope((), (TokenSelector(positions=PositionRange(PROMPT_LENGTH + 1)),)),
        Scope((TokenSelector(token_ids=(1,)),)),
        Scope((TokenSelector(last_k=2), TokenSelector(token_ids=(1,)))),
    ],
)
def test_a_scope_that_holds_some_generated_tokens_and_not_others_is_not_settled(scope: Scope) -> None:
    assert settled_mask(scope, SequenceTokens(PROMPT_LENGTH, ROLES)) is None


# Of a prompt of 14 tokens: in the prompt and on, from a generated token on, and all but those.
ENDING_LATE = {
    "begins in the prompt": Scope((TokenSelector(positions=PositionRange(4, 17)),)),
    "begins later": Scope((TokenSelector(positions=PositionRange(15, 17)),)),
    "is left out": Scope((), (TokenSelector(positions=PositionRange(4, 17)),)),
    "of the generated": Scope((TokenSelector(phase=Phase.GENERATED, positions=PositionRange(-2, 17)),)),
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("case", ENDING_LATE)
def test_a_range_that_ends_among_the_generated_tokens_ends_there(case: str, kernels: bool) -> None:
    s = shapes("llama")
    program = Program((edit("add", Site.RESID_POST, s, scope=ENDING_LATE[case]),))
    asked = Job(prompt(f"late end {case}", 14), program, max_tokens=8)
    with reference_only():
        outcome = run_alone("llama", asked, EngineConfig(kv_block_size=4, kv_cache_tokens=256, kernels=kernels))
    assert_same("llama", asked, outcome)
