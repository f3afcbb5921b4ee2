"""Defects in the analysis of neurons."""

from planted.mutant import Mutant

NEURONS = "patchclamp_server.analysis.neurons."

NEURON_METHODS = [
    Mutant(
        "sign-of-no-effect",
        NEURONS + "find",
        "values = effects.sign() * abs(job.value)",
        "values = torch.full_like(effects, abs(job.value))",
        "a neuron that writes against a word is clamped to make it less likely",
        (
            "analysis/neurons/test_decode.py::"
            "test_the_best_have_the_largest_effects_of_either_sign_and_values_have_their_signs",
        ),
    ),
    Mutant(
        "norm-of-the-mlp-forgotten",
        NEURONS + "weights",
        "return _centred(norm, rows.float() * norm.weight.float())",
        "return _centred(norm, rows.float())",
        "rows of gate and up are read without the norm that stands before them",
        ("analysis/neurons/test_decode.py::test_tokens_and_effects_are_those_of_an_explicit_product",),
    ),
    Mutant(
        "layer-norm-keeps-its-mean",
        NEURONS + "weights",
        "return directions if norm.bias is None else directions - directions.mean(-1, keepdim=True)",
        "return directions",
        "what a layer norm takes away counts as an effect",
        ("analysis/neurons/test_decode.py::test_tokens_and_effects_are_those_of_an_explicit_product",),
    ),
    Mutant(
        "random-sets-of-the-set",
        NEURONS + "random_sets",
        "others = np.setdiff1d(np.arange(d_ff), own)",
        "others = np.arange(d_ff)",
        "random sets have neurons of the set that they are compared with",
        ("analysis/neurons/test_sets.py::test_random_sets_have_as_many_neurons_in_each_layer_and_none_of_the_set",),
    ),
    Mutant(
        "bootstrap-of-apart-draws",
        NEURONS + "intervals",
        "others = torch.stack([value(items) - base for items in random])",
        "others = torch.stack([value(items).roll(1) - base for items in random])",
        "random sets are resampled apart from what they are compared with",
        ("analysis/neurons/test_intervals.py::test_what_all_items_have_in_common_has_no_width",),
    ),
    Mutant(
        "values-of-other-neurons",
        NEURONS + "edits",
        "by_layer.setdefault(neuron.layer, []).append((neuron.neuron, value))",
        "by_layer.setdefault(neuron.layer, []).insert(0, (neuron.neuron, abs(value)))",
        "neurons are clamped to the sizes of their values without the signs",
        ("rpc/test_neuron_evaluation.py::test_facts_are_scored_as_by_hooks_with_the_best_neurons_first",),
    ),
]
