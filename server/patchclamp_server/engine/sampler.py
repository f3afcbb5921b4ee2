"""Batched sampling: one token for each row of logits, each row with its own parameters.

For logits l of one row, in this order:

0. l_i ← l_i + bias_i, and l_i ← -∞ for tokens that may not come yet (StopParams.min_tokens);
1. penalties: l_i ← l_i / r where l_i > 0, else l_i · r, for every i seen in prompt or output (CTRL, Keskar et al. 2019,
   section 4.1); then l_i ← l_i - presence - frequency · count_i for every i in the output;
2. temperature: s = (l - max l) / T; T = 0 takes the most likely token (the lowest id among equals) and ends here;
3. top-k: keep s_i ≥ the k-th largest value;
4. top-p (Holtzman et al. 2020): keep s_i ≥ the value at which the mass of what top-k left, summed from the most likely
   token down, first reaches p;
5. min-p: keep e^(s_i) ≥ min_p (the most likely token has s = 0);
6. the inverse of the CDF, in the order of token ids, at one uniform number of the row.

Every filter is a threshold on s, so tokens equal in value are kept or dropped together and the result does not depend
on the order in which a sort leaves them. The uniform number is a function of (seed, number of tokens drawn) alone.
Log-probabilities are those of the model's own distribution, log softmax(l), before all of this.

What is drawn from a row, and its log-probabilities, do not depend on the other rows: what torch does here is exact or
an operation of single numbers that is rounded once, and on a CPU sums and exponentials are those of sampling_rows.py.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.invariant import operators
from patchclamp_server.engine.request import SamplingParams
from patchclamp_server.engine.uniforms import Uniforms

# A row whose logits hold NaN or +inf gets this `Sampled.id`: without a distribution, the caller must fail the request.
NOT_FINITE = -1

# The nucleus is looked for in a sorted head of a row of these sizes, before the row is sorted in full. The CPU's top-k
# is a cheap heap up to 1/64 of the row and a costlier selection above.
CANDIDATES = (256, 1024)
BLOCK = 256


@dataclass(frozen=True, eq=False)
class SamplingRow:
    """What sampling needs to know of one sequence. `output_ids` grows; the draw is for the token after its last one."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # These are not drawn while the output has fewer than `min_tokens`.
    end_ids: tuple[int, ...] = ()
    min_tokens: int = 0

    @cached_property
    def distinct_prompt_ids(self) -> NDArray[np.int64]:
        return np.unique(np.asarray(self.prompt_ids, dtype=np.int64))

    @cached_property
    def uses_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    def biases(self) -> tuple[tuple[int, float], ...]:
        """(id, what is added to its logit) for the next token; an id may come twice."""
        if len(self.output_ids) < self.min_tokens:
            return (*self.params.logit_bias, *((id, -math.inf) for id in self.end_ids))
        return self.params.logit_bias

    @cached_property
    def uniforms(self) -> Uniforms:
        return Uniforms(self.seed)


class Sampled(NamedTuple):
    """A drawn token. `logprob` is None and `top_logprobs` empty unless the row asked; the likeliest is first."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """Draws one token for each row. logits: [n, vocab] float32, left unchanged; rows: n."""
    assert logits.ndim == 2
    assert logits.shape[0] == len(rows)
    assert logits.dtype == torch.float32
    ids = _draw(logits, rows)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and ids[i] != NOT_FINITE]
    if not wanted:
        return [Sampled(id) for id in ids]
    sampled = [Sampled(id) for id in ids]
    for i, scores in zip(wanted, _logprobs(logits, rows, ids, wanted), strict=True):
        sampled[i] = scores
    return sampled


def drawn_seed() -> int:
    """Returns a seed for a request without one: below 2^53, so that clients whose numbers are doubles can send it."""
    return secrets.randbits(53)


def warm_up(device: torch.device) -> None:
    """Compiles what is compiled at run time, so that no request waits for it."""
    sample(torch.zeros(1, 2, device=device), [SamplingRow(SamplingParams(1.0, top_p=0.5, logprobs=1), 0, (), ())])


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    penalised = [i for i, row in enumerate(rows) if row.uses_penalties]
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    biases = [(i, biases) for i, row in enumerate(rows) if (biases := row.biases())]
    if biases:
        logits = _biased(logits, biases)
    if penalised:
        logits = _penalise(logits, rows, penalised)
    # One pass gives the greedy choice, the maximum for the others, and shows NaN (which argmax prefers).
    best = _argmax(logits)  # [n, 1]
    peak = logits.gather(-1, best)  # [n, 1]
    ids = torch.where(peak.isfinite(), best, NOT_FINITE).squeeze(-1)
    chosen: list[int] = ids.tolist()
    random = [i for i in random if chosen[i] != NOT_FINITE]
    if random:
        whole = len(random) == len(rows)
        scores = logits - peak if whole else logits[random] - peak[random]
        for i, id in zip(random, _draw_random(scores, [rows[i] for i in random]), strict=True):
            chosen[i] = id
    return chosen


def _argmax(logits: Tensor) -> Tensor:
    """Returns the first of the largest of each row [n, vocab], as [n, 1]; in a row with NaN, the first NaN."""
    if logits.device.type == "cpu":
        # numpy's argmax compares vectors, torch's single numbers; and no other thread has to wake for it.
        return torch.from_numpy(logits.numpy().argmax(axis=-1, keepdims=True))
    return logits.argmax(dim=-1, keepdim=True)


def _biased(logits: Tensor, biases: Sequence[tuple[int, tuple[tuple[int, float], ...]]]) -> Tensor:
    """Returns a copy of the logits with what is added to those of some rows."""
    places = np.array([(i, id) for i, own in biases for id, _ in own], dtype=np.int64)
    values = np.array([value for _, own in biases for _, value in own], dtype=np.float32)
    row, token = torch.from_numpy(places).to(logits.device).unbind(1)
    return logits.index_put((row, token), torch.from_numpy(values).to(logits.device), accumulate=True)


def _penalise(logits: Tensor, rows: Sequence[SamplingRow], penalised: Sequence[int]) -> Tensor:
    """Returns a copy of the logits with the penalties of the rows `penalised`."""
    places, tokens, counts, lengths = [], [], [], []
    for i in penalised:
        out, out_counts = np.unique(np.asarray(rows[i].output_ids, dtype=np.int64), return_counts=True)
        prompt = np.setdiff1d(rows[i].distinct_prompt_ids, out, assume_unique=True)
        tokens += [out, prompt]
        counts += [out_counts, np.zeros_like(prompt)]
        places.append(i)
        lengths.append(len(out) + len(prompt))

    def each(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(device)

    device = logits.device
    row = torch.from_numpy(np.repeat(np.array(places, dtype=np.int64), lengths)).to(device)
    token = torch.from_numpy(np.concatenate(tokens)).to(device)
    count = torch.from_numpy(np.concatenate(counts).astype(np.float32)).to(device)
    repetition = each([rows[i].params.repetition_penalty for i in penalised])
    presence = each([rows[i].params.presence_penalty for i in penalised])
    frequency = each([rows[i].params.frequency_penalty for i in penalised])
    seen = logits[row, token]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen = seen - presence * (count > 0) - frequency * count
    return logits.index_put((row, token), seen)


def _draw_random(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Returns ids drawn from l - max l ([m, vocab], overwritten) of rows with a temperature."""
    device = scores.device
    # A temperature that float32 cannot hold would make 0/0 of the maximum.
    tiny = torch.finfo(torch.float32).tiny
    temperature = torch.tensor([max(row.params.temperature, tiny) for row in rows], dtype=torch.float32, device=device)
    scores.div_(temperature[:, None])
    threshold = _thresholds(scores, rows)
    if threshold is not None:
        scores.masked_fill_(scores < threshold[:, None], -math.inf)
    u = torch.tensor([row.uniforms.at(len(row.output_ids)) for row in rows], dtype=torch.float64, device=device)
    if operators.holds_for(scores):
        from patchclamp_server.engine.sampling_rows import invert_cdf

        found = invert_cdf(scores, u)
    else:
        found = _invert_cdf(scores.exp_(), u)
    ids: list[int] = found.tolist()
    return ids


def log_totals(logits: Tensor) -> Tensor:
    """Returns log Σ exp(l) of each row [n, vocab], as [n, 1]."""
    if operators.holds_for(logits):
        from patchclamp_server.engine import sampling_rows

        return sampling_rows.log_totals(logits)
    return torch.logsumexp(logits, dim=-1, keepdim=True)


def _running_masses(head: Tensor, log_total: Tensor) -> Tensor:
    """Returns Σ_{j ≤ i} exp(l_j - log total) of each row [n, size], float64."""
    if operators.holds_for(head):
        from patchclamp_server.engine.sampling_rows import running_masses

        return running_masses(head, log_total)
    return (head.double() - log_total.double()).exp().cumsum(dim=-1)


def _invert_cdf(mass: Tensor, u: Tensor) -> Tensor:
    """Returns the first id [m] at which the running sum of `mass` [m, vocab] passes u [m] float64 times its total.

    It takes two steps, over blocks and then within one, so that no running sum over the vocabulary is written.
    """
    blocks = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % BLOCK)).view(len(mass), -1, BLOCK)
    upto = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [m, blocks]
    target = _below(u * upto[:, -1], upto[:, -1])[:, None]
    block = torch.searchsorted(upto, target, right=True)  # [m, 1]
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(mass), device=mass.device), block.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(inside, _below(target - before, inside[:, -1:]), right=True)
    return (block * BLOCK + place).squeeze(-1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Returns `target`, but less than `total` whatever the rounding, so that the place found has mass."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _thresholds(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor | None:
    """Returns the smallest score each row keeps, [m]; None without filters. scores: [m, vocab], 0 at the maximum."""
    vocab = scores.shape[-1]
    limited = [i for i, row in enumerate(rows) if 0 < row.params.top_k < vocab]
    nucleus = [i for i, row in enumerate(rows) if row.params.top_p < 1.0]
    relative = [i for i, row in enumerate(rows) if row.params.min_p > 0.0]
    if not (limited or nucleus or relative):
        return None
    threshold = torch.full((len(rows),), -math.inf, dtype=torch.float32, device=scores.device)
    if limited:
        k = torch.tensor([rows[i].params.top_k for i in limited], device=scores.device)
        head = scores[limited].topk(int(k.max()), dim=-1).values
        threshold[limited] = head.gather(-1, k[:, None] - 1).squeeze(-1)
    if nucleus:
        top_p = torch.tensor([rows[i].params.top_p for i in nucleus], dtype=torch.float64, device=scores.device)
        kept = scores[nucleus]
        kept.masked_fill_(kept < threshold[nucleus, None], -math.inf)
        threshold[nucleus] = torch.maximum(threshold[nucleus], _nucleus_thresholds(kept, top_p))
    if relative:
        floor = [math.log(rows[i].params.min_p) for i in relative]
        threshold[relative] = torch.maximum(
            threshold[relative], torch.tensor(floor, dtype=torch.float32, device=scores.device)
        )
    # The most likely token stays whatever top_p or min_p are.
    return threshold.clamp_max_(0.0)


def _nucleus_thresholds(scores: Tensor, top_p: Tensor, candidates: Sequence[int] = CANDIDATES) -> Tensor:
    """Returns the scores at which the mass from the top down reaches top_p [m] float64. scores: [m, vocab]."""
    vocab = scores.shape[-1]
    # The masses are relative to the total, as softmax divides; the running sum over the head is in float64.
    log_total = log_totals(scores)
    threshold = torch.empty(scores.shape[0], dtype=torch.float32, device=scores.device)
    todo = torch.arange(scores.shape[0], device=scores.device)
    for size in (*(c for c in candidates if c < vocab), vocab):
        part = scores if len(todo) == len(scores) else scores[todo]
        whole_row = size == vocab
        head = part.sort(dim=-1, descending=True).values if whole_row else part.topk(size, dim=-1).values
        reached = _running_masses(head, log_total[todo])
        place = torch.searchsorted(reached, top_p[todo, None])
        fits = (place < size).squeeze(-1)
        if whole_row:
            # Rounding may leave the whole mass just under top_p.
            fits.fill_(True)
        place.clamp_max_(size - 1)
        threshold[todo[fits]] = head.gather(-1, place).squeeze(-1)[fits]
        todo = todo[~fits]
        if not len(todo):
            break
    return threshold


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], ids: Sequence[int], wanted: Sequence[int]) -> list[Sampled]:
    """Returns the rows `wanted`, with the log-probability of the chosen token and of the n most likely ones."""
    raw = logits if len(wanted) == len(rows) else logits[list(wanted)]
    log_total = log_totals(raw)  # [m, 1]
    chosen = torch.tensor([ids[i] for i in wanted], device=logits.device)[:, None]
    own: list[float] = (raw.gather(-1, chosen) - log_total).squeeze(-1).tolist()
    counts = [min(rows[i].params.logprobs or 0, logits.shape[-1]) for i in wanted]
    top_values, top_ids = raw.topk(max(counts), dim=-1)
    values, tokens = (top_values - log_total).tolist(), top_ids.tolist()
    return [
        Sampled(ids[i], own[j], tuple(zip(tokens[j][: counts[j]], values[j][: counts[j]], strict=True)))
        for j, i in enumerate(wanted)
    ]
