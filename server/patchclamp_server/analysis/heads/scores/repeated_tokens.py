"""Random tokens that repeat, and where heads look on them: what induction, previous-token and n-gram scores share.

A sequence is [BOS] r r. Within r, read as a circle, no n tokens in a row occur twice, while shorter runs do (a token
occurs about OCCURRENCES times, or once where n = 1): in the second r, the last n tokens have one earlier occurrence,
and fewer of them have several. Measurements are means over the queries in the second r whose last n tokens lie in it.
"""

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchclamp_server.analysis.heads.attention_mass import NOWHERE, attention_mass
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Work
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.prompt import PromptEncoder

OCCURRENCES = 4
# A random circle is refused when it has a run of n tokens twice; this many in a row never are.
ATTEMPTS = 1000
AFTER_OTHERS = "after_other_occurrences_of_the_last_token"


@dataclass(frozen=True)
class Repeated:
    """The sequence `tokens` [T] ends with twice `period` tokens."""

    tokens: Tensor
    period: int

    def queries(self, n: int) -> Tensor:
        """Returns the positions in the second occurrence whose last n tokens lie in it."""
        length = len(self.tokens)
        return torch.arange(length - self.period + n - 1, length)


# Maps queries and the period to the positions on which these queries are scored.
Target = Callable[[Tensor, int], Tensor]


async def measure(
    engine: Engine, prompts: PromptEncoder, job: Scoring, *, n: int, target: Target
) -> AsyncGenerator[Progress | HeadScores, None]:
    """Yields progress by sequence, then the scores. The score is the weight on `target(queries, period)`.

    The control is the weight on positions drawn evenly from those a query sees, but for the target. Where n > 1, the
    evidence has the weight on the token after another occurrence of the last token, whose n - 1 before it differ.
    """
    repeated = await prompts.analysis.run(sequences, engine.model, prompts, job, n)
    work = _measured(engine.model.decoder, repeated, job, target, n)
    told: AsyncGenerator[Progress | HeadScores, None] = exclusively(engine, work)
    async with aclosing(told) as events:
        async for event in events:
            yield event


def _measured(
    decoder: Decoder, drawn: list[Repeated], job: Scoring, target: Target, n: int
) -> Work[Progress | HeadScores]:
    samples, controls, shorter = [], [], []
    generator = torch.Generator().manual_seed(job.seed)
    for done, repeated in enumerate(drawn):
        queries = repeated.queries(n)
        scored = target(queries, repeated.period)
        other = other_occurrence(repeated, queries, generator)
        targets = torch.stack((scored, random_positions(queries, scored, generator), other), dim=1)
        mass = yield from attention_mass(decoder, repeated.tokens, targets)
        means = mass.mean(dim=2)
        samples.append(means[:, :, 0])
        controls.append(means[:, :, 1])
        if (other != NOWHERE).any():
            shorter.append(mass[:, :, other != NOWHERE, 2].mean(dim=2))
        yield Progress("sequences", done + 1, job.sequences)
    found = HeadScores.means(torch.stack(samples), torch.stack(controls), job.seed)
    if shorter:
        found = replace(found, evidence={AFTER_OTHERS: found.by_head(torch.stack(shorter).mean(0))})
    yield found


def sequences(model: LoadedModel, prompts: PromptEncoder, job: Scoring, n: int) -> list[Repeated]:
    """Returns the sequences. Raises InvalidArgument for a length that the model has no room or too few tokens for."""
    if job.sequences < 1:
        raise InvalidArgument("sequences", f"expected at least 1, got {job.sequences}")
    if job.sequence_tokens < 2:
        raise InvalidArgument("sequence_tokens", f"expected at least 2, got {job.sequence_tokens}")
    context = model.info.context_length
    start = prompts.text_start
    if len(start) + 2 * job.sequence_tokens > context:
        message = f"twice {job.sequence_tokens} tokens are more than the context of {context}"
        raise InvalidArgument("sequence_tokens", message)
    vocabulary = ordinary_tokens(model.tokenizer, model.info.vocab_size)
    generator = torch.Generator().manual_seed(job.seed)
    return [repeated_tokens(job.sequence_tokens, n, vocabulary, start, generator) for _ in range(job.sequences)]


def repeated_tokens(
    period: int, n: int, vocabulary: Tensor, start: tuple[int, ...], generator: torch.Generator
) -> Repeated:
    """Draws one sequence. Raises InvalidArgument for a vocabulary too small for `period` tokens that differ in every
    n."""
    # There are twice as many runs of n as are needed, so that few random circles are refused.
    distinct = period if n == 1 else max(math.ceil(period / OCCURRENCES), math.ceil((2 * period) ** (1 / n)))
    if distinct > len(vocabulary):
        raise InvalidArgument("sequence_tokens", f"the tokenizer has {len(vocabulary)} tokens; {distinct} are needed")
    alphabet = vocabulary[torch.randperm(len(vocabulary), generator=generator)[:distinct]]
    for _ in range(ATTEMPTS):
        circle = _circle(period, n, distinct, generator)
        if circle is not None:
            tokens = alphabet[torch.tensor(circle)]
            return Repeated(torch.cat((torch.tensor(start, dtype=torch.int64), tokens, tokens)), period)
    raise InvalidArgument(
        "ngram", f"found no {period} tokens in which no {n} in a row occur twice; ask for more tokens"
    )


def _circle(period: int, n: int, distinct: int, generator: torch.Generator) -> list[int] | None:
    circle: list[int] = []
    runs: set[tuple[int, ...]] = set()
    while len(circle) < period:
        last = tuple(circle[len(circle) - n + 1 :]) if n > 1 else ()
        full = len(circle) >= n - 1
        free = [token for token in range(distinct) if not full or (*last, token) not in runs]
        if not free:
            return None
        circle.append(free[int(torch.randint(len(free), (1,), generator=generator))])
        if full:
            runs.add((*last, circle[-1]))
    return circle if len({tuple((circle * 2)[i : i + n]) for i in range(period)}) == period else None


def random_positions(queries: Tensor, excluded: Tensor, generator: torch.Generator) -> Tensor:
    """Returns for each query a position at or before it, but not the excluded one; all are equally likely."""
    drawn = (torch.rand(len(queries), generator=generator) * queries).long()
    return drawn + (drawn >= excluded)


def other_occurrence(repeated: Repeated, queries: Tensor, generator: torch.Generator) -> Tensor:
    """Returns for each query the position after another occurrence of its token in the first half, or NOWHERE."""
    tokens, period = repeated.tokens, repeated.period
    begin = len(tokens) - 2 * period
    same = tokens[begin : begin + period] == tokens[queries][:, None]  # [n, period]
    same[torch.arange(len(queries)), queries - period - begin] = False
    some = same.any(dim=1)
    found = torch.full((len(queries),), NOWHERE)
    if some.any():
        found[some] = begin + 1 + torch.multinomial(same[some].float(), 1, generator=generator)[:, 0]
    return found


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Returns the ids of all tokens that are not special."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    # The table may have rows that no token has.
    return torch.tensor([id for id in range(min(vocab_size, len(tokenizer))) if id not in special])
