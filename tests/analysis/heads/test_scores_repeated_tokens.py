"""Random tokens that repeat: what recurs in them, and what is never among them."""

import pytest
import torch
from planted_heads import BOS, WORDS, planted
from tiny_models import VOCAB

from patchclamp_server.analysis.heads.attention_mass import NOWHERE
from patchclamp_server.analysis.heads.scores.repeated_tokens import (
    Repeated,
    ordinary_tokens,
    other_occurrence,
    random_positions,
    repeated_tokens,
)
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.prompt import PromptEncoder


def sequence(period: int, n: int, seed: int = 0, start: tuple[int, ...] = ()) -> Repeated:
    return repeated_tokens(period, n, torch.arange(3, VOCAB), start, torch.Generator().manual_seed(seed))


def earlier_occurrences(tokens: list[int], query: int, n: int) -> list[int]:
    last = tokens[query - n + 1 : query + 1]
    return [j for j in range(n - 1, query) if tokens[j - n + 1 : j + 1] == last]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("period", [5, 16, 64])
def test_the_last_n_tokens_of_a_query_occurred_once_before(period: int, n: int) -> None:
    repeated = sequence(period, n, start=(1,))
    tokens = repeated.tokens.tolist()
    assert len(tokens) == 1 + 2 * period
    assert tokens[1 : 1 + period] == tokens[1 + period :]
    queries = repeated.queries(n).tolist()
    assert queries == list(range(period + n, 1 + 2 * period))
    for query in queries:
        assert earlier_occurrences(tokens, query, n) == [query - period]


def test_single_tokens_recur_where_runs_of_several_are_unique() -> None:
    tokens = sequence(64, 2).tokens.tolist()
    assert len(set(tokens)) == 16
    assert any(len(earlier_occurrences(tokens, query, 1)) > 2 for query in range(64, 128))


def test_the_token_after_another_occurrence_is_not_the_one_after_the_run() -> None:
    repeated = sequence(64, 2)
    queries = repeated.queries(2)
    found = other_occurrence(repeated, queries, torch.Generator().manual_seed(0))
    assert (found != NOWHERE).sum() > 32
    for query, place in zip(queries.tolist(), found.tolist(), strict=True):
        if place != NOWHERE:
            assert repeated.tokens[place - 1] == repeated.tokens[query]
            assert place != query - 64 + 1
            assert place <= 64


def test_random_positions_are_all_that_a_query_sees_but_one() -> None:
    queries, excluded = torch.full((2000,), 5), torch.full((2000,), 3)
    drawn = random_positions(queries, excluded, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [0, 1, 2, 4, 5]
    assert drawn.bincount().max() < 500


def test_a_seed_gives_the_same_tokens_and_another_one_others() -> None:
    first, again, other = (sequence(16, 2, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_special_tokens_are_never_drawn(tiny_llama: LoadedModel) -> None:
    special = set(tiny_llama.tokenizer.all_special_ids)
    assert special
    vocabulary = ordinary_tokens(tiny_llama.tokenizer, tiny_llama.info.vocab_size).tolist()
    assert set(vocabulary) == set(range(tiny_llama.info.vocab_size)) - special


def test_rows_of_the_embedding_that_no_token_has_are_never_drawn(tiny_llama: LoadedModel) -> None:
    more_rows = tiny_llama.info.vocab_size + 64
    assert int(ordinary_tokens(tiny_llama.tokenizer, more_rows).max()) == tiny_llama.info.vocab_size - 1


def test_a_sequence_starts_as_the_tokenizer_starts_a_text(tiny_llama: LoadedModel) -> None:
    with_bos = planted()
    assert PromptEncoder(with_bos.tokenizer, with_bos.info).text_start == (BOS,)
    assert PromptEncoder(tiny_llama.tokenizer, tiny_llama.info).text_start == ()


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="has 40 tokens; 41 are needed") as refused:
        repeated_tokens(41, 1, torch.arange(len(WORDS)), (), torch.Generator())
    assert refused.value.field == "sequence_tokens"
