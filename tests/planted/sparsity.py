"""Defects in sparse policies."""

from planted.mutant import Mutant

EVALUATE = "patchclamp_server.analysis.sparsity.evaluate"

SPARSITY = [
    Mutant(
        "share-rounded-down",
        "patchclamp_server.sparsity.policies.shares",
        "int(keep * n + 0.5)",
        "int(keep * n)",
        "a keep ratio keeps the next smaller whole number",
        ("sparsity/test_formulas.py::test_a_keep_ratio_keeps_the_nearest_whole_number",),
    ),
    Mutant(
        "threshold-of-the-rest",
        "patchclamp_server.sparsity.policies.shares",
        "grid[round((1.0 - keep) * STEPS)]",
        "grid[round(keep * STEPS)]",
        "a threshold keeps what it should leave out",
        ("sparsity/test_formulas.py::test_thresholds_keep_the_share_asked_for",),
    ),
    Mutant(
        "griffin-without-norms",
        "patchclamp_server.sparsity.policies.griffin",
        "shares = squares / squares.sum(1, keepdim=True).clamp_min(1e-30)",
        "shares = squares",
        "loud tokens of a prompt decide which neurons are kept",
        ("sparsity/test_formulas.py::test_griffin_ranks_the_norms_of_columns_of_normalised_rows",),
    ),
    Mutant(
        "core-rounded-down",
        "patchclamp_server.sparsity.policies.coreinfer_stability",
        "k = -int(-token_keep * positives.double().mean().item() // 1)",
        "k = int(token_keep * positives.double().mean().item() // 1)",
        "the core of a token has one neuron too few",
        ("sparsity/test_formulas.py::test_stability_counts_how_often_a_neuron_is_in_the_core_of_a_token",),
    ),
    Mutant(
        "fovea-trusts-its-sketch",
        "patchclamp_server.sparsity.policies.fovea",
        "scores *= up.square() + self._up_error[layer].square()",
        "scores *= up.square()",
        "a neuron whose sketch happens to be near zero is dropped",
        ("sparsity/test_formulas.py::test_a_selector_per_token_keeps_its_largest_scores",),
    ),
    Mutant(
        "wina-without-norms",
        "patchclamp_server.sparsity.policies.wina",
        "x.abs() * self._norms[layer][projection]",
        "x.abs()",
        "inputs are ranked without the weights that they meet",
        ("sparsity/test_formulas.py::test_wina_weighs_an_input_by_the_norm_of_its_column",),
    ),
    Mutant(
        "control-is-itself",
        "patchclamp_server.analysis.sparsity.control",
        "policy.seed + 1 if isinstance(policy, RandomSet) else 0",
        "policy.seed if isinstance(policy, RandomSet) else 0",
        "a random set is its own control",
        ("analysis/sparsity/test_jobs.py::test_a_random_set_is_not_its_own_control",),
    ),
    Mutant(
        "mean-of-ratios",
        EVALUATE,
        "float(torch.tensor(log_ratio, dtype=torch.float64).exp())",
        "_mean([float(torch.tensor(s.nll - s.dense_nll, dtype=torch.float64).exp()) for s in documents])",
        "perplexity ratios are averaged where their logarithms should be",
        ("analysis/sparsity/test_jobs.py::test_quality_is_that_of_the_logits_of_masked_passes",),
    ),
    Mutant(
        "scored-by-the-dense-prompt",
        EVALUATE,
        "e.position > prompt",
        "e.position >= prompt",
        "the token that the dense prompt predicts counts as one of the policy",
        ("analysis/sparsity/test_jobs.py::test_quality_is_that_of_the_logits_of_masked_passes",),
    ),
]
