"""This checks whether ordinary text stays in the range of the dtype that a model is served in."""

import logging

import torch
from transformers import PreTrainedTokenizerBase

from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.overflow import FiniteProbe, range_of
from patchclamp_server.model.sites import every_preactivation

logger = logging.getLogger(__name__)

TEXT = (
    "The river runs past the old mill, where 12 people met on a cold morning in 1897. They counted apples, read the "
    "news aloud and asked: who will mend the bridge? def add(a, b): return a + b"
)
MAX_TOKENS = 64


@torch.inference_mode()
def warn_of_overflow(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Logs a warning that names the place. Only float16 is too narrow: models are trained in the other dtypes."""
    if decoder.dtype != torch.float16:
        return
    spec = decoder.spec
    ids = [i for i in tokenizer(TEXT)["input_ids"] if i < spec.vocab_size][: min(MAX_TOKENS, spec.context_length)]
    if len(ids) < 2:
        return
    n = len(ids)
    positions = torch.arange(n, device=decoder.device)
    # The pool has one block of n tokens, behind block 0, which stays zero.
    pools = [decoder.pool(2, n) for _ in decoder.blocks]
    attention = AttentionBatch([Span(0, n, 0, [1])], n, decoder.windows, decoder.device)
    probe = FiniteProbe()
    step = StepInputs(
        torch.tensor(ids, device=decoder.device),
        positions,
        positions + n,
        attention,
        visited_preactivations=every_preactivation(spec.n_layers),
    )
    x = decoder.forward(step, pools, probe)
    place = probe.first
    if place is None and bool(torch.isfinite(decoder.logits(x)).all()):
        return
    where = "the logits pass" if place is None else f"{place} passes"
    name, largest, wider = range_of(decoder.dtype)
    logger.warning(
        "on ordinary text %s %s, the largest number of %s: requests will fail; %s", where, largest, name, wider
    )
