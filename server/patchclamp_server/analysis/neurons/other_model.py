"""A second checkpoint, loaded for one job: its activations on the tokens of the served model."""

import gc
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward, inputs_of, pool_for
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site

log = logging.getLogger(__name__)


def load_other(path: str, beside: LoadedModel, field: str) -> LoadedModel:
    """Loads a checkpoint in the precision and on the device of the served model. Call it in a thread.

    Raises FailedPrecondition naming `field` where it cannot be loaded, or has another tokenizer. What it is loaded from
    is the operator's: only the log says it.
    """
    info = beside.info
    try:
        other = load_model(
            path,
            dtype=getattr(torch, info.dtype),
            device=info.device,
            batch_invariant=beside.decoder.batch_invariant,
        )
    except ModelSourceError as error:
        log.error("the checkpoint %s cannot be loaded: %s", path, error)
        raise FailedPrecondition(field, "the checkpoint cannot be loaded; the log of the server says why") from error
    if other.tokenizer.get_vocab() != beside.tokenizer.get_vocab():
        raise FailedPrecondition(field, "has another vocabulary; expected a checkpoint with the same tokenizer")
    return other


def release() -> None:
    """Gives back the memory of a model that nobody holds any more: it may have cycles, and what CUDA keeps for later is
    wanted by the served one. Call it in a thread."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def activations(
    other: LoadedModel, tokens: tuple[int, ...], units: Mapping[int, Tensor], skip: int
) -> Sliced[dict[int, Tensor]]:
    """Returns float32 [T - skip, n] of mlp_post for the `units` [n] of each layer named."""
    documents, kept = torch.tensor([tokens]), _Kept(units, skip)
    decoder = other.decoder
    yield from forward(decoder, inputs_of(documents, 0, len(tokens), decoder), pool_for(decoder, documents), kept)
    return kept.rows


class _Kept:
    """A hook that keeps rows of chosen units."""

    visited = None

    def __init__(self, units: Mapping[int, Tensor], skip: int) -> None:
        self.rows: dict[int, Tensor] = {}
        self._units, self._skip = units, skip

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.MLP_POST and layer in self._units:
            self.rows[layer] = x[self._skip :].index_select(1, self._units[layer].to(x.device)).float()
