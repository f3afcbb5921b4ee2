"""Calibrates policies: documents in, profile out. What a policy needs of them is one function, listed in CALIBRATIONS.

Statistics are of the dense model, over all tokens of the documents (every few rows where quantiles are taken): reducers
get them while the documents run as requests of the engine. Where they are sums of squares, attention sinks are left out
(interventions/pooling.py); quantiles and counts hardly see so few tokens.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import OnEvent, listening
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import completed, exclusively
from patchclamp_server.analysis.sparsity.damage import SQUARED_ERRORS, measure_damage, squared_errors
from patchclamp_server.analysis.sparsity.kmeans import elbow_clusters
from patchclamp_server.analysis.sparsity.quantiles import quantiles
from patchclamp_server.analysis.sparsity.teal_allocation import greedy_path
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, Telling, Work
from patchclamp_server.engine.reducers.beginnings import Beginnings
from patchclamp_server.engine.reducers.ordinary_sums import OrdinarySums
from patchclamp_server.engine.reducers.reducer import Place, Reducer
from patchclamp_server.engine.reducers.sample import Sample
from patchclamp_server.engine.request import Reduction, Request
from patchclamp_server.errors import InvalidArgument, renaming_fields
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.coreinfer_similarity import CoreInferSimilarity, multi_hot
from patchclamp_server.sparsity.policies.coreinfer_stability import core_counts, token_order
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import PROJECTIONS, Policy, input_widths
from patchclamp_server.sparsity.profile import Profile

# Where samples are kept rather than sums, one of so many rows of each document is kept.
SAMPLE_EVERY = 16
SENTENCE_TOKENS = 64
# The slower measurements use so many of the documents.
DAMAGE_DOCUMENTS = 2
GREEDY_DOCUMENTS, GREEDY_TOKENS = 2, 128

# These bound one calibration to an hour of a small CPU, and its memory.
MAX_TOKENS = 1 << 18
KEPT_BYTES = 4 << 30

Tensors = dict[str, Tensor]
# These are parts of the work at the exclusive door of the engine.
Found: TypeAlias = Telling[Progress, Tensors]


@dataclass(frozen=True, eq=False)
class Calibrating:
    """The parts of a calibration. `reducers` take the inputs of products, by product. `finish`, a part of a work at the
    exclusive door of the engine, makes tensors of what they have seen in all documents. `evaluate` measures with that
    profile, by requests, and yields the tensors of the end. `residuals` gets the residual streams before the blocks."""

    reducers: Mapping[str, Reducer]
    finish: Callable[[Steps], Found]
    evaluate: Callable[[Engine, Tensors, Steps], AsyncGenerator[Progress | Tensors, None]] | None = None
    residuals: Beginnings | None = None


async def calibrate_on(engine: Engine, policy: Policy, documents: Tensor) -> AsyncGenerator[Progress | Profile, None]:
    """Yields progress, then a profile of `policy` from documents [n, tokens], each of which is a request of the engine.

    The stage is "calibration", counted in documents and, for what is measured after them layer by layer, in layers.
    Raises InvalidArgument where the policy has nothing to calibrate.
    """
    model = engine.sparse_model
    calibrating, steps = _begun(policy, model, documents)
    kept = calibrating.residuals

    def request(text: int, document: Tensor) -> Callable[[OnEvent], Request]:
        reduction = None if kept is None or text >= kept.texts else Reduction(Site.RESID_PRE, kept, text)
        return partial(listening, model, calibrating.reducers, tuple(document.tolist()), text, reduction)

    requests = (request(text, document) for text, document in enumerate(documents))
    with renaming_fields({"prompt": "text.document_tokens"}):
        async with aclosing(completed(engine, requests)) as finished:
            async for _ in finished:
                yield steps.advance()

    def finish() -> Work[Progress | Tensors]:
        yield (yield from calibrating.finish(steps))

    told: AsyncGenerator[Progress | Tensors, None] = exclusively(engine, finish())
    tensors: Tensors = {}
    async with aclosing(told) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
            else:
                tensors = event
    if calibrating.evaluate is not None:
        async with aclosing(calibrating.evaluate(engine, tensors, steps)) as evaluated:
            async for event in evaluated:
                if isinstance(event, Progress):
                    yield event
                else:
                    tensors = event
    card = {"calibration_documents": len(documents), "calibration_tokens": documents.numel()}
    yield Profile(policy.name, model.fingerprint, tensors, card)


def _begun(policy: Policy, model: SparseModel, documents: Tensor) -> tuple[Calibrating, Steps]:
    function = CALIBRATIONS.get(policy.name)
    if function is None:
        raise InvalidArgument("sparsity.policy", f"{policy.name} needs no profile; these do: {', '.join(CALIBRATIONS)}")
    by_layer = _is_greedy(policy) or _measures_damage(policy)
    steps = Steps("calibration", len(documents) + (model.n_layers if by_layer else 0))
    return function(policy, model, documents), steps


def most_tokens(policy: Policy, model: SparseModel) -> int:
    """Returns the most tokens of documents that calibration takes: what is kept of them has KEPT_BYTES."""
    spec = model.spec
    width = {
        "teal": sum(input_widths(spec)),
        "cats": spec.d_model,
        "fovea": spec.d_model,
    }.get(policy.name, 0)
    by_token = 4 * width / SAMPLE_EVERY
    if policy.name == "coreinfer_similarity":
        by_token = 8 * spec.d_ff / SENTENCE_TOKENS
    return min(MAX_TOKENS, int(KEPT_BYTES / max(1.0, by_token * model.n_layers)))


def _is_greedy(policy: Policy) -> bool:
    return isinstance(policy, Teal) and policy.allocation == "greedy"


def _measures_damage(policy: Policy) -> bool:
    return isinstance(policy, Fovea) and policy.budget == "measured"


def _sampled(model: SparseModel, documents: Tensor, *names: str) -> dict[str, Sample]:
    """Returns samples of the inputs of the products named."""
    return {name: Sample(_layers(model), SAMPLE_EVERY, documents.shape[1]) for name in names}


def _layers(model: SparseModel) -> tuple[int, ...]:
    return tuple(range(model.n_layers))


def _teal(policy: Policy, model: SparseModel, documents: Tensor) -> Calibrating:
    samples = _sampled(model, documents, *PROJECTIONS)
    few, tokens = min(GREEDY_DOCUMENTS, len(documents)), min(GREEDY_TOKENS, documents.shape[1])
    residuals = Beginnings(_layers(model), few, tokens) if _is_greedy(policy) else None

    def finish(steps: Steps) -> Found:
        tensors: Tensors = {}
        for name, sample in samples.items():
            found = []
            for layer in sample.layers:
                found.append((yield from quantiles(sample.take(layer).abs())))
            tensors[f"quantiles.{name}"] = torch.stack(found)
        if residuals is not None:
            tensors["greedy"] = yield from _greedy(model, residuals, tensors, steps)
        return tensors

    return Calibrating(samples, finish, residuals=residuals)


def _greedy(model: SparseModel, residuals: Beginnings, quantiles: Tensors, steps: Steps) -> Telling[Progress, Tensor]:
    paths = []
    for layer in range(model.n_layers):
        grids = [quantiles[f"quantiles.{name}"][layer] for name in PROJECTIONS]
        paths.append((yield from greedy_path(model, layer, residuals.take(layer), residuals.texts, grids)))
        yield steps.advance()
    length = min(map(len, paths))
    return torch.stack([path[:length] for path in paths])


def _cats(policy: Policy, model: SparseModel, documents: Tensor) -> Calibrating:
    samples = _sampled(model, documents, "mlp_input")

    def finish(steps: Steps) -> Found:
        found = []
        for layer, weights in enumerate(model.layers):
            x, done, activated = samples["mlp_input"].take(layer), 0, list[Tensor]()
            while done < len(x):
                rows = yield Slice(len(x) - done)
                activated.append(MlpInput(x[done : done + rows], weights).activated.abs())
                done += len(activated[-1])
            found.append((yield from quantiles(torch.cat(activated))))
        return {"quantiles": torch.stack(found)}

    return Calibrating(samples, finish)


def _static_set(policy: Policy, model: SparseModel, documents: Tensor) -> Calibrating:
    # The first token alone, an attention sink, would outweigh the hundreds of others of a document at some layers.
    squares = OrdinarySums(_layers(model), documents.shape[1], of=torch.square)

    def finish(steps: Steps) -> Found:
        yield Slice(1)
        norms = [weights.down_norm.float() for weights in model.layers]
        return {"scores": torch.stack([squares.sum(i).float() * norm.square() for i, norm in enumerate(norms)])}

    return Calibrating({"mlp_output": squares}, finish)


def _similarity(policy: Policy, model: SparseModel, documents: Tensor) -> Calibrating:
    assert isinstance(policy, CoreInferSimilarity)
    sentences = Sentences(policy, model, min(SENTENCE_TOKENS, documents.shape[1]))

    def finish(steps: Steps) -> Found:
        yield Slice(1)
        by_sentence = sentences.counts()  # [sentences, n_layers, d_ff]
        cluster_layer = model.n_layers - 1 if policy.end_layer is None else max(policy.end_layer - 1, 0)
        centres, assigned = elbow_clusters(multi_hot(by_sentence[:, cluster_layer]))
        totals = torch.zeros(len(centres), *by_sentence.shape[1:], dtype=by_sentence.dtype)
        totals.index_add_(0, assigned.cpu(), by_sentence.cpu())
        return {
            "centres": centres,
            "counts": totals.to(centres.device),
            "cluster_layer": torch.tensor(cluster_layer),
        }

    return Calibrating({"mlp_output": sentences}, finish)


class Sentences(Reducer):
    """Keeps core counts [d_ff] of every sentence: each `tokens` tokens of a document, but for those that are left
    over."""

    def __init__(self, policy: CoreInferSimilarity, model: SparseModel, tokens: int) -> None:
        super().__init__(_layers(model))
        self._policy, self._d_ff, self._tokens = policy, model.spec.d_ff, tokens
        # These have, by document, sentence and layer, the orders of its tokens until it has all, then its counts.
        self._orders: defaultdict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._counts: dict[tuple[int, int, int], Tensor] = {}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        order, positives = token_order(rows, self._policy)
        done = 0
        while done < len(rows):
            sentence, token = divmod(place.start + done, self._tokens)
            part = slice(done, min(done + self._tokens - token, len(rows)))
            key = (place.text, sentence, layer)
            self._orders[key].append((order[part], positives[part]))
            if token + part.stop - part.start == self._tokens:
                self._counts[key] = core_counts(self._orders.pop(key), self._policy.token_keep, self._d_ff)
            done = part.stop

    def counts(self) -> Tensor:
        """Returns the counts [sentences, layers, d_ff], by document and place in it."""
        found = [self._counts[key] for key in sorted(self._counts)]
        return torch.stack(found).view(-1, len(self.layers), self._d_ff)


def _fovea(policy: Policy, model: SparseModel, documents: Tensor) -> Calibrating:
    assert isinstance(policy, Fovea)
    sampled = _sampled(model, documents, "mlp_input")
    evaluate = partial(measure_damage, policy, documents[:DAMAGE_DOCUMENTS]) if _measures_damage(policy) else None
    return Calibrating(sampled, partial(_fovea_errors, policy, model, sampled["mlp_input"]), evaluate)


def _fovea_errors(policy: Fovea, model: SparseModel, sample: Sample, steps: Steps) -> Found:
    samples = [sample.take(layer) for layer in sample.layers]
    yield Slice(1)
    # This selector has no uncertainty; it serves to see its sketches.
    shape = (model.n_layers, model.spec.d_ff)
    names = [f"gate_error.{policy.bits}", f"up_error.{policy.bits}"]
    blind = Profile(policy.name, model.fingerprint, {name: torch.zeros(shape) for name in names})
    sketches = policy.bind(model, blind).sketches
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for x, sketched in zip(samples, sketches, strict=True):
        done, squares = 0, torch.zeros(2, model.spec.d_ff, device=x.device)
        while done < len(x):
            rows = yield Slice(len(x) - done)
            part = x[done : done + rows]
            exact = MlpInput(part, sketched.weights)
            squares[0] += (sketched.gate(part) - exact.gate).float().square().sum(0)
            if sketched.weights.gate is not None:
                squares[1] += (sketched.up(part) - exact.up).float().square().sum(0)
            done += len(part)
        gate, up = (squares / len(x)).sqrt()
        errors[0].append(gate)
        if sketched.weights.gate is not None:
            errors[1].append(up)
    tensors = {name: torch.stack(found) for name, found in zip(names, errors, strict=True) if found}
    if _measures_damage(policy):
        profile = Profile(policy.name, model.fingerprint, tensors)
        tensors[SQUARED_ERRORS] = yield from squared_errors(replace(policy, budget="uniform"), model, profile, samples)
    return tensors


CALIBRATIONS: Mapping[str, Callable[[Policy, SparseModel, Tensor], Calibrating]] = {
    "teal": _teal,
    "cats": _cats,
    "static_set": _static_set,
    "coreinfer_similarity": _similarity,
    "fovea": _fovea,
}
