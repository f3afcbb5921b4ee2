"""The scoring methods have the names of the enum HeadScoreMethod, in lower case without its prefix."""

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from patchclamp_server.analysis.heads.scores import (
    induction,
    ngram,
    ov_nuclear_norm,
    previous_token,
    successor,
    temporal,
)
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.text.prompt import PromptEncoder


class ScoringMethod(Protocol):
    """Yields progress, then the scores of all heads of the engine's model. Ending the iteration early cancels it.

    Raises InvalidArgument or FailedPrecondition, naming fields of Scoring, for a job that the model cannot do.
    """

    def __call__(
        self, engine: Engine, prompts: PromptEncoder, job: Scoring
    ) -> AsyncGenerator[Progress | HeadScores, None]: ...


SCORING_METHODS: Mapping[str, ScoringMethod] = {
    "induction": induction.scores,
    "previous_token": previous_token.scores,
    "ngram": ngram.scores,
    "successor": successor.scores,
    "ov_nuclear_norm": ov_nuclear_norm.scores,
    "temporal": temporal.scores,
}
# The work of these methods is requests of the engine; that of the others is work at its exclusive door.
ENGINE_METHODS: frozenset[str] = frozenset({"temporal"})
