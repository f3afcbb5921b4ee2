"""N-gram heads: from a run of n tokens to what followed its earlier occurrence.

    score_h = mean over sequences r r and queries t in the second r of mass_h(t, j + 1)
    j < t: the one position with tokens[j - n + 1 .. j] = tokens[t - n + 1 .. t]

The tokens of r are drawn so that n in a row occur once and fewer recur (repeated_tokens.py): a head that matches the
last token alone divides its weight among all its occurrences, and `after_other_occurrences_of_the_last_token` in the
evidence is then as large as its score. n = 1 is the score of induction.py. Source: Akyürek et al. 2024, In-Context
Language Learning: Architectures and Algorithms, which samples its texts from automata, where matches have to be
counted; repeated random tokens have exactly one.
"""

from collections.abc import AsyncGenerator

from patchclamp_server.analysis.heads.scores.repeated_tokens import measure
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder


def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    if not 1 <= job.ngram <= job.sequence_tokens:
        raise InvalidArgument(
            "ngram", f"expected 1 to {job.sequence_tokens}, the tokens of a sequence, got {job.ngram}"
        )
    return measure(engine, prompts, job, n=job.ngram, target=lambda queries, period: queries - period + 1)
