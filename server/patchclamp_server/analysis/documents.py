"""Documents of one length as a step of the decoder: every document a sequence with consecutive KV blocks of its own."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.engine.reducers.reducer import Reducer, Rows
from patchclamp_server.engine.request import Event, Priority, Reduction, Request, SparseInference, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.pools import Pool
from patchclamp_server.model.attention.spans import Span
from patchclamp_server.model.decoder import NO_HOOKS, BlockProducts, Decoder, SiteHooks, StepInputs
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import Cost, Selection, Selector, SequenceState

BLOCK = 16
Tokenize = Callable[[str], Sequence[int]]
OnEvent = Callable[[Event], None]


def documents_of(texts: Sequence[str], tokenize: Tokenize, tokens: int) -> Tensor:
    """[n, tokens]: the first tokens of each text that is long enough. InvalidArgument: none is."""
    cut = [ids[:tokens] for ids in map(tokenize, texts) if len(ids) >= tokens]
    if not cut:
        raise InvalidArgument("texts", f"none of {len(texts)} texts has {tokens} tokens")
    return torch.tensor(cut)


def pools_for(decoder: Decoder, documents: Tensor, layers: range | None = None) -> list[Pool]:
    """Returns the KV pools of `layers` (None: of all), large enough for the documents; block 0 stays zero."""
    return [_pool(decoder, documents) for _ in _of(decoder, layers)]


def pool_for(decoder: Decoder, documents: Tensor, layers: range | None = None) -> list[Pool]:
    """As `pools_for`, for one pass over whole documents: no layer reads what another wrote, so all have one pool."""
    return [_pool(decoder, documents)] * len(_of(decoder, layers))


def _of(decoder: Decoder, layers: range | None) -> range:
    return range(decoder.spec.n_layers) if layers is None else layers


def _pool(decoder: Decoder, documents: Tensor) -> Pool:
    n, tokens = documents.shape
    return decoder.pool(n * _blocks(tokens) + 1, BLOCK)


def inputs_of(documents: Tensor, start: int, end: int, decoder: Decoder) -> StepInputs:
    """Tokens [start, end) of every document."""
    n, length = len(documents), end - start
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


def forward(
    decoder: Decoder,
    inputs: StepInputs,
    pools: Sequence[Pool],
    hooks: SiteHooks = NO_HOOKS,
    products: Sequence[BlockProducts] | None = None,
    *,
    start: Tensor | None = None,
    layers: range | None = None,
    tokens: int | None = None,
) -> Sliced[Tensor]:
    """Runs the blocks a few layers at a time, one at least: bit for bit what Decoder.run_blocks gives in one go.

    `start` [T, d_model]: the residual stream before the first of `layers`; None: what the tokens begin with. `tokens`:
    what the caller pays for; all rows unless it says so.
    """
    rows, n_layers = len(inputs.token_ids), decoder.spec.n_layers
    charged = rows if tokens is None else tokens
    x, left = start, _of(decoder, layers)
    while left:
        granted = yield Slice(-(-rows * len(left) // n_layers), charged)
        charged = 0
        n = max(1, granted * n_layers // rows)
        if x is None:
            x = decoder.embed(inputs.token_ids, inputs.positions)
        part, left = left[:n], left[n:]
        x = decoder.run_blocks(x, part, inputs, pools[: len(part)], hooks, products)
        pools = pools[len(part) :]
    assert x is not None
    return x


def _blocks(tokens: int) -> int:
    return (tokens + BLOCK - 1) // BLOCK


class Listener(Selector):
    """Selects nothing, and gives the inputs of the four products of every block of one text to reducers, by product."""

    def __init__(self, model: SparseModel, reducers: Mapping[str, Reducer], text: int) -> None:
        self.model = model
        self.profile = None
        self.keep = (0.0,) * model.n_layers
        self._rows = {projection: Rows(reducer, text) for projection, reducer in reducers.items()}
        # The token that comes next, by product and layer.
        self._next: dict[tuple[str, int], int] = {}

    def begin(self) -> SequenceState:
        self._next.clear()
        return super().begin()

    def channels(self, layer: int, projection: str, x: Tensor) -> None:
        if (rows := self._rows.get(projection)) is not None:
            start = self._next.get((projection, layer), 0)
            rows.add(layer, x, start)
            self._next[projection, layer] = start + len(x)

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection | None:
        return None

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return Cost(1.0, 0.0)


def listening(
    model: SparseModel,
    reducers: Mapping[str, Reducer],
    document: tuple[int, ...],
    text: int,
    reduction: Reduction | None,
    on_event: OnEvent,
) -> Request:
    """Runs a document whose inputs of products the reducers get, and a reduction the rows of its site."""
    return Request(
        document,
        on_event,
        stop=StopParams(max_tokens=0),
        priority=Priority.ANALYSIS,
        reductions=() if reduction is None else (reduction,),
        sparsity=SparseInference("", Listener(model, reducers, text), listens=True),
    )
