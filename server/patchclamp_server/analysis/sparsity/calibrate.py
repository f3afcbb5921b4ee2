"""Calibration: documents in, profile out. What a policy needs of them is one function, listed in CALIBRATIONS.

Statistics are of the dense model, over all tokens of the documents (every few rows where quantiles are taken). Where
they are sums of squares, attention sinks are left out (pooling.py); quantiles and counts hardly see so few tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import KeepSite, inputs_of, pools_for, product_inputs
from patchclamp_server.analysis.progress import Progress, Steps, unheard
from patchclamp_server.analysis.sparsity.evaluate import Evaluator
from patchclamp_server.analysis.sparsity.kmeans import elbow_clusters
from patchclamp_server.analysis.sparsity.teal_allocation import greedy_path
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import ordinary_tokens, outliers
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.budgets import GRID, REFERENCE, damage_curves
from patchclamp_server.sparsity.policies.coreinfer_similarity import CoreInferSimilarity, multi_hot
from patchclamp_server.sparsity.policies.coreinfer_stability import core_counts, token_order
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.shares import quantiles
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import PROJECTIONS, Policy, input_widths
from patchclamp_server.sparsity.profile import Profile

# Rows kept of each document where samples are kept rather than sums.
SAMPLE_EVERY = 16
SENTENCE_TOKENS = 64
# Of the documents, what the slower measurements use.
DAMAGE_DOCUMENTS, DAMAGE_ROWS = 2, 128
GREEDY_DOCUMENTS, GREEDY_TOKENS = 2, 128

# Bounds of one calibration: an hour of a small CPU, and memory.
MAX_TOKENS = 1 << 18
KEPT_BYTES = 4 << 30

Tensors = dict[str, Tensor]


def calibrate(
    policy: Policy,
    model: SparseModel,
    documents: Tensor,
    card: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> Profile:
    """A profile of `policy` from documents [n, tokens]. InvalidArgument: the policy has nothing to calibrate.

    The stage that `progress` hears of is "calibration", counted in documents and, for what is measured after them layer
    by layer, in layers.
    """
    function = CALIBRATIONS.get(policy.name)
    if function is None:
        raise InvalidArgument("sparsity.policy", f"{policy.name} needs no profile; these do: {', '.join(CALIBRATIONS)}")
    by_layer = _is_greedy(policy) or _measures_damage(policy)
    steps = Steps(progress, "calibration", len(documents) + (model.n_layers if by_layer else 0))
    tensors = function(policy, model, documents, steps)
    tokens = {"calibration_documents": len(documents), "calibration_tokens": documents.numel()}
    return Profile(policy.name, model.fingerprint, tensors, {**tokens, **(card or {})})


def most_tokens(policy: Policy, model: SparseModel) -> int:
    """Tokens of documents that calibration takes at most: what is kept of them has KEPT_BYTES."""
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


def _heard(model: SparseModel, documents: Tensor, steps: Steps) -> Iterator[dict[tuple[int, str], Tensor]]:
    """The inputs of the products for every few documents, which are a step each."""
    for part, heard in product_inputs(model, documents):
        yield heard
        steps.advance(len(part))


def _samples(model: SparseModel, documents: Tensor, steps: Steps, *names: str) -> dict[str, list[Tensor]]:
    """Some inputs [n, width] of the products named, by layer."""
    parts: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(model.n_layers)] for name in names}
    for heard in _heard(model, documents, steps):
        for name, layers in parts.items():
            for layer, kept in enumerate(layers):
                kept.append(heard[layer, name][::SAMPLE_EVERY].clone())
    # Taken out one by one: the parts and the whole of all layers would be twice the memory.
    return {name: [torch.cat(layers.pop(0)) for _ in range(model.n_layers)] for name, layers in parts.items()}


def _teal(policy: Policy, model: SparseModel, documents: Tensor, steps: Steps) -> Tensors:
    samples = _samples(model, documents, steps, *PROJECTIONS)
    tensors = {
        f"quantiles.{name}": torch.stack([quantiles(x.abs()) for x in layers]) for name, layers in samples.items()
    }
    if _is_greedy(policy):
        few = documents[:GREEDY_DOCUMENTS, :GREEDY_TOKENS]
        residuals = KeepSite(Site.RESID_PRE)
        decoder = model.decoder
        decoder.forward(inputs_of(few, 0, few.shape[1], decoder), pools_for(decoder, few), residuals)
        paths = []
        for layer in range(model.n_layers):
            grids = [tensors[f"quantiles.{name}"][layer] for name in PROJECTIONS]
            paths.append(greedy_path(decoder, layer, residuals.kept[layer], len(few), grids))
            steps.advance()
        length = min(map(len, paths))
        tensors["greedy"] = torch.stack([path[:length] for path in paths])
    return tensors


def _cats(policy: Policy, model: SparseModel, documents: Tensor, steps: Steps) -> Tensors:
    samples = zip(_samples(model, documents, steps, "mlp_input")["mlp_input"], model.layers, strict=True)
    return {"quantiles": torch.stack([quantiles(MlpInput(x, weights).activated.abs()) for x, weights in samples])}


def _static_set(policy: Policy, model: SparseModel, documents: Tensor, steps: Steps) -> Tensors:
    scores = torch.zeros(model.n_layers, model.spec.d_ff)
    for heard in _heard(model, documents, steps):
        for layer, weights in enumerate(model.layers):
            neurons = heard[layer, "mlp_output"].float()
            # Of the hundreds of tokens of a document the first alone, an attention sink, would decide at some layers.
            neurons = neurons[ordinary_tokens(neurons.view(-1, documents.shape[1], neurons.shape[1])).flatten()]
            scores[layer] += (neurons.square().sum(0) * weights.down_norm.float().square()).cpu()
    return {"scores": scores.to(model.decoder.device)}


def _similarity(policy: Policy, model: SparseModel, documents: Tensor, steps: Steps) -> Tensors:
    assert isinstance(policy, CoreInferSimilarity)
    tokens = min(SENTENCE_TOKENS, documents.shape[1])
    sentences = []
    for heard in _heard(model, documents, steps):
        rows = heard[0, "mlp_output"].shape[0]
        for start in range(0, rows - tokens + 1, tokens):
            counts = [
                core_counts(
                    [token_order(heard[layer, "mlp_output"][start : start + tokens], policy)],
                    policy.token_keep,
                    model.spec.d_ff,
                )
                for layer in range(model.n_layers)
            ]
            sentences.append(torch.stack(counts))
    by_sentence = torch.stack(sentences)  # [sentences, n_layers, d_ff]
    cluster_layer = model.n_layers - 1 if policy.end_layer is None else max(policy.end_layer - 1, 0)
    centres, assigned = elbow_clusters(multi_hot(by_sentence[:, cluster_layer]))
    totals = torch.zeros(len(centres), *by_sentence.shape[1:], dtype=by_sentence.dtype)
    totals.index_add_(0, assigned.cpu(), by_sentence.cpu())
    return {
        "centres": centres,
        "counts": totals.to(centres.device),
        "cluster_layer": torch.tensor(cluster_layer),
    }


@torch.inference_mode()
def _fovea(policy: Policy, model: SparseModel, documents: Tensor, steps: Steps) -> Tensors:
    assert isinstance(policy, Fovea)
    samples = _samples(model, documents, steps, "mlp_input")["mlp_input"]
    # A selector without uncertainty, to see its sketches with.
    shape = (model.n_layers, model.spec.d_ff)
    names = [f"gate_error.{policy.bits}", f"up_error.{policy.bits}"]
    blind = Profile(policy.name, model.fingerprint, {name: torch.zeros(shape) for name in names})
    sketches = policy.bind(model, blind).sketches
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for x, sketched in zip(samples, sketches, strict=True):
        exact = MlpInput(x, sketched.weights)
        errors[0].append((sketched.gate(x) - exact.gate).float().square().mean(0).sqrt())
        if sketched.weights.gate is not None:
            errors[1].append((sketched.up(x) - exact.up).float().square().mean(0).sqrt())
    tensors = {name: torch.stack(found) for name, found in zip(names, errors, strict=True) if found}
    if _measures_damage(policy):
        profile = Profile(policy.name, model.fingerprint, tensors)
        tensors["damage"] = _damage(replace(policy, budget="uniform"), model, documents, profile, samples, steps)
    return tensors


def _damage(
    policy: Fovea, model: SparseModel, documents: Tensor, profile: Profile, samples: list[Tensor], steps: Steps
) -> Tensor:
    """D [n_layers, GRID] of budgets.py."""
    few = documents[:DAMAGE_DOCUMENTS]
    evaluator = Evaluator(model, few, few.shape[1] // 2)
    divergence, errors = [], []
    for layer, x in enumerate(samples):
        alone = tuple(REFERENCE if other == layer else 1.0 for other in range(model.n_layers))
        divergence.append(evaluator.quality(replace(policy, keep_ratio=alone).bind(model, profile)).divergence)
        mlp = MlpInput(x[:: max(1, len(x) // DAMAGE_ROWS)], model.layers[layer])
        down, row = mlp.weights.down, []
        ordinary = ~outliers((mlp.neurons @ down).norm(dim=1))
        for keep in GRID:
            selector = replace(policy, keep_ratio=keep).bind(model, profile)
            selection = selector.select(selector.begin(), layer, mlp)
            error = mlp.neurons.masked_fill(selection.active, 0.0) @ down
            if selection.remainder is not None:
                error -= selection.remainder(selection.active)
            row.append(float(error[ordinary].float().square().sum()))
        errors.append(row)
        steps.advance()
    return damage_curves(torch.tensor(divergence), torch.tensor(errors))


CALIBRATIONS: Mapping[str, Callable[[Policy, SparseModel, Tensor, Steps], Tensors]] = {
    "teal": _teal,
    "cats": _cats,
    "static_set": _static_set,
    "coreinfer_similarity": _similarity,
    "fovea": _fovea,
}
