"""Each selection against a naive loop over its published formula."""

import math
from dataclasses import replace

import pytest
import torch
from kept_sites import KeepSite
from sparse_models import bound, calibrated, documents, evaluated, profile, run, sparse_model

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.analysis.sparsity.kmeans import elbow_clusters
from patchclamp_server.analysis.sparsity.quantiles import quantiles
from patchclamp_server.analysis.sparsity.teal_allocation import greedy_path
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import MlpInput, matrix
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.budgets import GRID, REFERENCE, allocate, damage_curves
from patchclamp_server.sparsity.policies.coreinfer_similarity import multi_hot
from patchclamp_server.sparsity.policies.shares import count, threshold, top_mask
from patchclamp_server.sparsity.policies.sketch import PACKED_ROWS, SketchedProduct, sketch
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policies.teal import STEP
from patchclamp_server.sparsity.policy import PROJECTIONS, weight_shares

D_FF = 80


def neurons(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, D_FF, generator=torch.Generator().manual_seed(seed))


def fixed_set(name: str, h: torch.Tensor, chunks: int = 1, **parameters: object) -> set[int]:
    """The set of layer 0 after a prompt whose neurons are h."""
    selector = bound(POLICIES[name](**parameters))
    state = selector.begin()
    for chunk in h.chunk(chunks):
        selector.observe_prompt(state, 0, chunk)
    selector.end_prompt(state)
    chosen = selector.fixed_set(state, 0)
    assert chosen is not None
    return set(chosen.nonzero().flatten().tolist())


def naive_stability(h: torch.Tensor, rank_by: str, token_keep: float, keep: float) -> set[int]:
    values = h.abs() if rank_by == "magnitude" else h
    positives = sum(int((row > 0).sum()) for row in values) / len(h)
    k = math.ceil(token_keep * positives)
    frequency = [0] * D_FF
    for row in values.tolist():
        for j in sorted(range(D_FF), key=lambda j: -row[j])[:k]:
            frequency[j] += row[j] > 0
    means = values.double().mean(0).tolist()
    # Those in no core come last, and among them those with the largest mean first.
    ranked = sorted(range(D_FF), key=lambda j: (-frequency[j], j if frequency[j] else -means[j], j))
    return set(ranked[: round(keep * D_FF)])


@pytest.mark.parametrize("rank_by", ["value", "magnitude"])
@pytest.mark.parametrize(("rows", "keep"), [(1, 0.4), (1, 0.1), (1, 1.0), (3, 0.9), (7, 0.4), (40, 0.1)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_stability_counts_how_often_a_neuron_is_in_the_core_of_a_token(
    rank_by: str, rows: int, keep: float, chunks: int
) -> None:
    h = neurons(rows)
    found = fixed_set("coreinfer_stability", h, chunks, rank_by=rank_by, token_keep=0.2, keep_ratio=keep)
    assert found == naive_stability(h, rank_by, 0.2, keep)


@pytest.mark.parametrize("rank_by", ["value", "magnitude"])
@pytest.mark.parametrize("rows", [1, 5])
def test_stability_computes_the_share_that_was_asked_for_however_short_the_prompt(rank_by: str, rows: int) -> None:
    """Of one token, 20 % of the positive neurons are its core: the others of half are those of the largest mean."""
    found = fixed_set("coreinfer_stability", neurons(rows), rank_by=rank_by, keep_ratio=0.5)
    assert len(found) == D_FF // 2


def test_activations_that_are_all_negative_fill_the_set_with_the_largest_of_them() -> None:
    h = -neurons(4).abs()
    wanted = set(h.double().mean(0).topk(D_FF // 2).indices.tolist())
    assert fixed_set("coreinfer_stability", h, rank_by="value", keep_ratio=0.5) == wanted


def test_a_policy_says_how_much_of_its_sets_it_filled_up() -> None:
    selector = bound(POLICIES["coreinfer_stability"](keep_ratio=0.5))
    for rows, expected in ((1, 1 - 16 / 40), (400, 0.0)):
        state = selector.begin()
        selector.observe_prompt(state, 0, neurons(rows))
        selector.end_prompt(state)
        assert state.filled_ratio == pytest.approx(expected)


def test_similarity_fills_up_a_cluster_whose_sentences_had_too_few_neurons_in_their_cores() -> None:
    made = profile("coreinfer_similarity")
    assert made is not None
    few = dict(made.tensors)
    few["counts"] = torch.zeros_like(few["counts"])
    few["counts"][:, :, 7] = 3
    selector = POLICIES["coreinfer_similarity"](keep_ratio=0.25).bind(sparse_model(), replace(made, tensors=few))
    state, h = selector.begin(), neurons(6)
    selector.observe_prompt(state, 0, h)
    selector.end_prompt(state)
    order = [j for j in h.abs().double().mean(0).argsort(descending=True).tolist() if j != 7]
    chosen = selector.fixed_set(state, 0)
    assert chosen is not None
    assert set(chosen.nonzero().flatten().tolist()) == {7, *order[:19]}
    assert state.filled_ratio == pytest.approx(19 / 20)


def test_an_empty_core_adds_the_bias_of_the_down_projection_alone() -> None:
    model = sparse_model()
    empty = StaticSet(neurons=dict.fromkeys(range(model.n_layers), ())).bind(model)
    nothing = bound(POLICIES["oracle"](keep_ratio=0.0))
    tokens = documents(1, 16)
    assert torch.equal(run(model, tokens, 8, [empty])[0][0], run(model, tokens, 8, [nothing])[0][0])


@pytest.mark.parametrize("chunks", [1, 4])
def test_griffin_ranks_the_norms_of_columns_of_normalised_rows(chunks: int) -> None:
    h = neurons(9)
    h[3] = 0
    scores = [0.0] * D_FF
    for row in h.tolist():
        length = math.sqrt(sum(v * v for v in row))
        for j, value in enumerate(row):
            scores[j] += (value / length) ** 2 if length else 0.0
    wanted = set(sorted(range(D_FF), key=lambda j: -scores[j])[:24])
    assert fixed_set("griffin", h, chunks, keep_ratio=0.3) == wanted


def test_similarity_takes_the_ranking_of_the_nearest_cluster() -> None:
    made = profile("coreinfer_similarity")
    assert made is not None
    centres, counts = made.tensors["centres"], made.tensors["counts"]
    selector = bound(POLICIES["coreinfer_similarity"](keep_ratio=0.25))
    layer, h = int(made.tensors["cluster_layer"]), neurons(12, seed=5)
    state = selector.begin()
    selector.observe_prompt(state, layer, h)
    selector.end_prompt(state)
    frequency = torch.zeros(D_FF)
    for row in h.abs():
        frequency[row.topk(16).indices] += 1
    hot = multi_hot(frequency)
    nearest = min(range(len(centres)), key=lambda c: float((centres[c] - hot).norm()))
    ranked = sorted(range(D_FF), key=lambda j: (-int(counts[nearest, 0, j]), j))[:20]
    assert set(state.sets[0].nonzero().flatten().tolist()) == {j for j in ranked if counts[nearest, 0, j]}


@pytest.mark.parametrize("name", ["cats", "oracle", "fovea"])
def test_a_selector_per_token_keeps_its_largest_scores(name: str) -> None:
    model, layer = sparse_model(), 1
    weights = model.layers[layer]
    parameters = {"budget": "uniform"} if name == "fovea" else {}
    selector = bound(POLICIES[name](keep_ratio=0.3, **parameters))
    x = torch.randn(5, model.spec.d_model, generator=torch.Generator().manual_seed(1))
    selection = selector.select(selector.begin(), layer, MlpInput(x, weights))
    assert selection is not None
    silu = torch.nn.functional.silu
    assert weights.gate is not None
    gate, up = x @ weights.gate.T + weights.gate_bias, x @ weights.up.T + weights.up_bias
    if name == "fovea":
        made = profile("fovea")
        assert made is not None
        gate = x @ sketch(weights.gate, 3).dense().T + weights.gate_bias
        up = x @ sketch(weights.up, 3).dense().T + weights.up_bias
        sigma, tau = made.tensors["gate_error.3"][layer], made.tensors["up_error.3"][layer]
        square = (silu(gate + sigma) ** 2 + silu(gate - sigma) ** 2) / 2
        scores = (square * (up**2 + tau**2)).sqrt() * weights.down.norm(dim=1)
    elif name == "cats":
        scores = silu(gate).abs()
    else:
        scores = (silu(gate) * up).abs() * weights.down.norm(dim=1)
    for row, active in zip(scores.tolist(), selection.active, strict=True):
        wanted = set(sorted(range(D_FF), key=lambda j: -row[j])[:24])
        assert set(active.nonzero().flatten().tolist()) == wanted


def test_what_fovea_does_not_compute_is_added_from_the_sketch() -> None:
    model = sparse_model()
    weights = model.layers[0]
    selector = bound(POLICIES["fovea"](keep_ratio=0.3))
    x = torch.randn(3, model.spec.d_model)
    selection = selector.select(selector.begin(), 0, MlpInput(x, weights))
    assert selection is not None
    assert selection.remainder is not None
    final = selection.active.clone()
    final[:, 7] = True  # forced: it must not be added twice
    assert weights.gate is not None
    gate = x @ sketch(weights.gate, 3).dense().T + weights.gate_bias
    up = x @ sketch(weights.up, 3).dense().T + weights.up_bias
    blurred = torch.nn.functional.silu(gate) * up * ~final
    exact = blurred @ sketch(weights.down.T, 3).dense().T
    torch.testing.assert_close(selection.remainder(final), exact, rtol=1e-3, atol=1e-4)


def test_cats_with_a_profile_uses_the_threshold_of_its_layer() -> None:
    model, made = sparse_model(), profile("cats")
    assert made is not None
    selector = POLICIES["cats"](keep_ratio=0.25).bind(model, made)
    mlp = MlpInput(torch.randn(4, model.spec.d_model), model.layers[2])
    selection = selector.select(selector.begin(), 2, mlp)
    assert selection is not None
    assert torch.equal(selection.active, mlp.activated.abs() >= made.tensors["quantiles"][2, 150])


def test_wina_weighs_an_input_by_the_norm_of_its_column() -> None:
    model = sparse_model()
    x = torch.randn(2, model.spec.d_model)
    mask = bound(POLICIES["wina"](keep_ratio=0.5)).channels(1, "qkv", x)
    weight = matrix(model.decoder.blocks[1].qkv)
    for row, kept in zip(x, mask, strict=True):
        scores = [abs(float(row[j])) * float(weight[:, j].norm()) for j in range(len(row))]
        assert set(kept.nonzero().flatten().tolist()) == set(sorted(range(48), key=lambda j: -scores[j])[:24])


def test_teal_compares_with_the_quantile_of_its_product() -> None:
    made = profile("teal")
    assert made is not None
    x = torch.randn(3, D_FF)
    mask = bound(POLICIES["teal"](keep_ratio=0.4)).channels(2, "mlp_output", x)
    assert torch.equal(mask, x.abs() >= made.tensors["quantiles.mlp_output"][2, 120])


def test_each_greedy_step_of_teal_lowers_one_product_and_the_block_by_one_step() -> None:
    made = profile("teal")
    assert made is not None
    shares = torch.tensor(weight_shares(sparse_model().spec))
    for path in made.tensors["greedy"]:
        changes = path[:-1] - path[1:]
        assert bool(((changes > 1e-6).sum(1) == 1).all())
        torch.testing.assert_close(changes @ shares, torch.full((len(changes),), STEP), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_greedy_path_of_teal_does_not_follow_the_first_token(layer: int) -> None:
    """However long its state: after the norm before attention the other tokens see the same of it."""
    model, made, texts = sparse_model(), profile("teal"), documents(2, 6, seed=1)
    assert made is not None
    kept = KeepSite(Site.RESID_PRE)
    model.decoder.forward(inputs_of(texts, 0, 6, model.decoder), pools_for(model.decoder, texts), kept)
    states = kept.kept[layer]
    sinks = states.clone()
    sinks[::6] *= 1000
    grids = [made.tensors[f"quantiles.{name}"][layer] for name in PROJECTIONS]
    paths = [at_once(greedy_path(model, layer, residual, 2, grids)) for residual in (states, sinks)]
    assert torch.equal(*paths)


def test_thresholds_keep_the_share_asked_for() -> None:
    values = torch.randn(5000).abs()
    grid = at_once(quantiles(values))
    for keep in (0.75, 0.5, 0.3):
        assert float((values >= threshold(grid, keep)).float().mean()) == pytest.approx(keep, abs=0.005)
    assert not (values >= threshold(grid, 0.0)).any()


@pytest.mark.parametrize("n", [1, 2, 201, 5000])
def test_quantiles_found_in_parts_are_those_of_all_values_sorted(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.analysis.sparsity.quantiles.PART", 64)
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).abs()
    values[n // 2 :: 7] = 0.0
    ranks = torch.linspace(0, n - 1, 201, dtype=torch.float64).round().long()
    assert torch.equal(at_once(quantiles(values)), values.sort().values[ranks])


def test_ties_do_not_change_how_many_are_kept() -> None:
    assert top_mask(torch.zeros(3, 10), 0.3).sum(1).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("keep", "n", "kept"), [(0.3, 10, 3), (0.36, 10, 4), (0.34, 10, 3), (0.25, 10, 3), (1.0, 7, 7), (0.0, 7, 0)]
)
def test_a_keep_ratio_keeps_the_nearest_whole_number(keep: float, n: int, kept: int) -> None:
    assert count(keep, n) == kept
    assert int(top_mask(torch.arange(float(n)), keep).sum()) == kept


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_sketch_errs_by_at_most_its_step_and_less_with_more_bits(bits: int) -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    copy = sketch(weight, bits)
    assert int(copy.codes.max()) < 2**bits
    error = float((copy.dense() - weight).norm() / weight.norm())
    assert error < {2: 0.4, 3: 0.2, 4: 0.1, 8: 0.01}[bits]


def test_a_sketch_multiplies_few_rows_packed_and_many_unpacked_by_the_same_matrix() -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    product, copy = SketchedProduct(weight, 3), sketch(weight, 3).dense()
    x = torch.randn(PACKED_ROWS + 1, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product(x), x @ copy.T)
    torch.testing.assert_close(product(x[:-1]), x[:-1] @ copy.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(product(x[:3])[1:], product(x[1:3]))


def test_a_sketch_is_in_the_dtype_of_its_input() -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows in (1, PACKED_ROWS + 1):
        x = torch.randn(rows, 96).bfloat16()
        found = SketchedProduct(weight, 3)(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), x.float() @ sketch(weight, 3).dense().T, rtol=2e-2, atol=2e-1)


def test_budgets_meet_the_average_and_spare_the_layer_that_is_harmed_most() -> None:
    errors = torch.tensor([[(1 - keep) ** 2 for keep in GRID]] * 3)
    curves = damage_curves(torch.tensor([0.1, 0.1, 1.0]), errors)
    assert float(curves[2, GRID.index(REFERENCE)]) == pytest.approx(1.0)
    kept = allocate(curves, 0.5)
    assert sum(kept) / 3 == pytest.approx(0.5, abs=0.02)
    assert kept[2] > kept[0]
    assert allocate(curves, 0.0) == [0.0] * 3


def test_clusters_are_found_where_there_are_some() -> None:
    points = torch.eye(5).repeat_interleave(6, 0) + 0.01 * torch.randn(30, 5)
    centres, assigned = elbow_clusters(points)
    assert len(centres) == 5
    assert len(set(assigned.tolist())) == 5


def test_static_scores_are_of_all_tokens_but_attention_sinks() -> None:
    model, texts = sparse_model(), documents(3, 24, seed=11)
    found = calibrated(StaticSet(), texts).tensors["scores"].clone()
    for text in texts.split(1):
        kept = KeepSite(Site.MLP_POST)
        decoder = model.decoder
        decoder.forward(inputs_of(text, 0, 24, decoder), pools_for(decoder, text), kept)
        for layer, weights in enumerate(model.layers):
            others = kept.kept[layer][1:]
            norms = others.norm(dim=1)
            ordinary = others[norms <= 3 * norms.median()]
            found[layer] -= ordinary.square().sum(dim=0) * weights.down.square().sum(dim=1)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-3)


def test_static_sets_name_layers_and_neurons_that_exist() -> None:
    with pytest.raises(InvalidArgument):
        StaticSet(neurons={0: (D_FF,)}).bind(sparse_model())
    with pytest.raises(InvalidArgument):
        StaticSet(neurons={9: (0,)}).bind(sparse_model())


def test_quality_of_dense_is_perfect_and_of_a_random_set_is_not() -> None:
    policies = POLICIES["dense"](), POLICIES["random"](keep_ratio=0.5)
    dense, random = evaluated(documents(3, 40), 16, *map(bound, policies))
    assert dense.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert dense.divergence == pytest.approx(0.0, abs=1e-5)
    assert (dense.top1_agreement, dense.sparsity, dense.bytes_read_16) == (1.0, 0.0, 1.0)
    assert random.divergence > 0.01
    assert (random.sparsity, random.bytes_read_16) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_document_needs_a_token_to_score() -> None:
    with pytest.raises(InvalidArgument):
        evaluated(documents(1, 16), 15)
