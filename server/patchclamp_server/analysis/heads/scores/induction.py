"""Induction heads: from the second occurrence of a token to what followed the first.

    score_h = mean over sequences r r and queries t in the second r of mass_h(t, t - |r| + 1)

the attention weight (attention_mass.py) on the token after the earlier occurrence of the current one, on repeated
random tokens of which none occurs twice in r (repeated_tokens.py). 1 is a pure induction head. Source: Bietti et al.
2023, Birth of a Transformer: A Memory Viewpoint; the name and the measure on repeated random tokens: Olsson et al.
2022, In-context Learning and Induction Heads.
"""

from collections.abc import AsyncGenerator

from patchclamp_server.analysis.heads.scores.repeated_tokens import measure
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.text.prompt import PromptEncoder


def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    return measure(engine, prompts, job, n=1, target=lambda queries, period: queries - period + 1)
