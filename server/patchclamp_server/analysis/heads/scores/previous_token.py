"""Previous-token heads: the weight of a query on the token before it.

    score_h = mean over sequences r r and queries t in the second r of mass_h(t, t - 1)

on the sequences of induction.py, so that both scores are of one measurement: an induction head composes with a
previous-token head of an earlier layer. Source: Bietti et al. 2023, Birth of a Transformer: A Memory Viewpoint.
"""

from collections.abc import AsyncGenerator

from patchclamp_server.analysis.heads.scores.repeated_tokens import measure
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.text.prompt import PromptEncoder


def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    return measure(engine, prompts, job, n=1, target=lambda queries, period: queries - 1)
