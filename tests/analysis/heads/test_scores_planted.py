"""Heads that were built by hand score 1 at what they do, and all others less."""

from collections.abc import Iterator

import pytest
import torch
from planted_heads import INDUCTION, PREVIOUS_TOKEN, SUCCESSOR, planted

from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

# The positions of the model hold BOS and twice this many tokens.
SMALL = {"sequence_tokens": 16, "sequences": 4}
AFTER_OTHERS = "after_other_occurrences_of_the_last_token"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(planted())
    engine.start()
    yield engine
    engine.shutdown()


async def scored(engine: Engine, job: Scoring) -> HeadScores:
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    *_, found = [event async for event in SCORING_METHODS[job.method](engine, prompts, job)]
    assert isinstance(found, HeadScores)
    return found


@pytest.mark.parametrize(
    ("method", "head"),
    [("previous_token", PREVIOUS_TOKEN), ("induction", INDUCTION), ("successor", SUCCESSOR)],
)
async def test_the_head_that_was_built_for_it_scores_one(engine: Engine, method: str, head: tuple[int, int]) -> None:
    found = await scored(engine, Scoring(method, **SMALL))
    assert found.best[0] == head
    assert found.scores[head] == pytest.approx(1.0, abs=1e-5)
    assert found.scores.flatten().sort().values[-2] < 0.2
    assert found.control[head] < 0.2


async def test_an_interval_holds_the_score_and_is_narrow_where_all_sequences_agree(engine: Engine) -> None:
    found = await scored(engine, Scoring("previous_token", **SMALL))
    assert found.low is not None
    assert found.high is not None
    assert (found.low <= found.scores + 1e-6).all()
    assert (found.scores <= found.high + 1e-6).all()
    assert found.high[PREVIOUS_TOKEN] - found.low[PREVIOUS_TOKEN] < 1e-5


async def test_one_sequence_has_no_interval(engine: Engine) -> None:
    found = await scored(engine, Scoring("induction", sequence_tokens=16, sequences=1))
    assert found.low is None
    assert found.high is None


async def test_a_head_that_matches_one_token_is_no_bigram_head(engine: Engine) -> None:
    found = await scored(engine, Scoring("ngram", ngram=2, **SMALL))
    best = found.evidence[AFTER_OTHERS]["best"][0]
    assert (best["layer"], best["head"]) == found.best[0] == INDUCTION
    # Tokens recur, so it looks after all their occurrences alike.
    assert found.scores[INDUCTION] < 0.5
    assert best["value"] == pytest.approx(float(found.scores[INDUCTION]), abs=0.1)


async def test_a_unigram_head_is_an_induction_head(engine: Engine) -> None:
    ngram = await scored(engine, Scoring("ngram", ngram=1, **SMALL))
    induction = await scored(engine, Scoring("induction", **SMALL))
    torch.testing.assert_close(ngram.scores, induction.scores)
    assert AFTER_OTHERS not in ngram.evidence


@pytest.mark.parametrize(
    ("job", "field", "message"),
    [
        (Scoring("induction", sequences=0), "sequences", "at least 1"),
        (Scoring("induction", sequence_tokens=1), "sequence_tokens", "at least 2"),
        (Scoring("induction", sequence_tokens=24), "sequence_tokens", "more than the context of 48"),
        (Scoring("ngram", ngram=0), "ngram", "expected 1 to 64"),
        (Scoring("ngram", ngram=17, sequence_tokens=16), "ngram", "expected 1 to 16"),
    ],
)
async def test_what_the_model_has_no_room_for_is_refused(
    engine: Engine, job: Scoring, field: str, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        await scored(engine, job)
    assert refused.value.field == field
