"""Latent predictions: the next token that a state would choose, had the model ended there.

    latent prediction of h  = argmax_t unembed(norm(h))_t
    p(t | h)                = exp(unembed(norm(h))_t - log Σ exp unembed(norm(h)))

The token whose probability is asked for is not known before the step is over: what it is computed from is kept until
then, which is d_model numbers a row and not a vocabulary of them. Whole rows are read, by torch on every device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import ReadoutTable, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext

# Logits of so many rows are held at once.
ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class LatentRows:
    """The rows of one layer whose latent predictions are read: row i belongs to `asked[i]`, a sequence and a position.

    `normed` [n, d_model] is what the unembedding reads, `log_sum` [n] the log of the sum of exp of its logits, and
    `top` [n] the token with the largest one.
    """

    layer: int
    asked: list[tuple[int, int]]
    normed: Tensor
    log_sum: Tensor
    top: Tensor


class LatentRule:
    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.read: tuple[Tensor, Tensor, Tensor] | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        decoder = self.entries.setting.decoder
        normed = decoder.final_norm(x.index_select(0, self.entries.rows))
        sums, tops = [], []
        for start in range(0, len(normed), ROWS_AT_ONCE):
            logits = decoder.unembed(normed[start : start + ROWS_AT_ONCE])
            top = logits.argmax(dim=1, keepdim=True)
            # The log-softmax of a row depends on no other row; torch.logsumexp adds a single one in another order.
            logprobs = torch.log_softmax(logits, dim=1)
            sums.append((logits.gather(1, top) - logprobs.gather(1, top))[:, 0])
            tops.append(top[:, 0])
        self.read = normed, torch.cat(sums), torch.cat(tops)

    def rows(self, layer: int, asked: list[tuple[int, int]]) -> LatentRows:
        """Returns what the last step read. A later step leaves it alone."""
        assert self.read is not None
        return LatentRows(layer, asked, *self.read)


def _nothing(readout: BoundReadout, layer: int) -> Written:
    return Written()


LATENT = ReadoutTable(EntryKind.LATENT, _nothing, LatentRule)
