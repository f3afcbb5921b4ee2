"""Documents of one length as a step of the decoder: every document a sequence with consecutive KV blocks of its own."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from patchclamp_server.callers import computes
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.attention.batch import AttentionBatch, Span
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.apply import Rows, Step, sparse_decoder
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import Cost, Selection, Selector, SequenceState

BLOCK = 16
BATCH_TOKENS = 512
Tokenize = Callable[[str], Sequence[int]]


def documents_of(texts: Sequence[str], tokenize: Tokenize, tokens: int) -> Tensor:
    """[n, tokens]: the first tokens of each text that is long enough. InvalidArgument: none is."""
    cut = [ids[:tokens] for ids in map(tokenize, texts) if len(ids) >= tokens]
    if not cut:
        raise InvalidArgument("texts", f"none of {len(texts)} texts has {tokens} tokens")
    return torch.tensor(cut)


def pools_for(decoder: Decoder, documents: Tensor) -> list[Tensor]:
    """KV pools of all layers, large enough for the documents; block 0 stays zero."""
    n, tokens = documents.shape
    spec = decoder.spec
    shape = (2, n * _blocks(tokens) + 1, BLOCK, spec.n_kv_heads, spec.head_dim)
    return [torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in decoder.blocks]


def inputs_of(documents: Tensor, start: int, end: int, decoder: Decoder) -> StepInputs:
    """Tokens [start, end) of every document, which the caller is about to compute."""
    n, length = len(documents), end - start
    computes(n * length)
    blocks = _blocks(documents.shape[1])
    tables = [list(range(1 + i * blocks, 1 + (i + 1) * blocks)) for i in range(n)]
    spans = [Span(i * length, length, start, table) for i, table in enumerate(tables)]
    positions = torch.arange(start, end)
    slots = torch.cat([table[0] * BLOCK + positions for table in tables])
    return StepInputs(
        documents[:, start:end].reshape(-1).to(decoder.device),
        positions.repeat(n).to(decoder.device),
        slots.to(decoder.device),
        AttentionBatch(spans, BLOCK, decoder.windows, decoder.device),
    )


def _blocks(tokens: int) -> int:
    return (tokens + BLOCK - 1) // BLOCK


class NoHooks:
    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        pass


class KeepSite:
    """Keeps what stands at one site [T, width], by layer."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.kept: dict[int, Tensor] = {}

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is self.site:
            self.kept[layer] = x.clone()


class Listener(Selector):
    """Selects nothing, and hears the inputs of the four products of every block."""

    def __init__(self, model: SparseModel, hear: Callable[[int, str, Tensor], None]) -> None:
        self.model = model
        self.profile = None
        self.keep = (0.0,) * model.n_layers
        self._hear = hear

    def channels(self, layer: int, projection: str, x: Tensor) -> None:
        self._hear(layer, projection, x)

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection | None:
        return None

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return Cost(1.0, 0.0)


@torch.inference_mode()
def product_inputs(model: SparseModel, documents: Tensor) -> Iterator[tuple[Tensor, dict[tuple[int, str], Tensor]]]:
    """For every few documents: those [b, tokens], and the inputs [b · tokens, width] by layer and product.

    As many at once as have BATCH_TOKENS, and one at least: their inputs at all layers are held together.
    """
    for part in torch.split(documents, max(1, BATCH_TOKENS // documents.shape[1])):
        heard: dict[tuple[int, str], Tensor] = {}

        def hear(layer: int, projection: str, x: Tensor, heard: dict[tuple[int, str], Tensor] = heard) -> None:
            heard[layer, projection] = x

        listener = Listener(model, hear)
        step = Step([Rows(slice(0, part.numel()), listener, listener.begin())])
        decoder = sparse_decoder(model, step)
        decoder.forward(inputs_of(part, 0, part.shape[1], decoder), pools_for(decoder, part), NoHooks())
        yield part, heard
