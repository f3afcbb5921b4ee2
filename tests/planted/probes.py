"""Defects in probes: training them, and reading them at single tokens."""

from planted.mutant import Mutant

TRAINING = "patchclamp_server.analysis.probes."
KIND = "patchclamp_server.interventions.kinds.probes"
STORED = "patchclamp_server.artifacts.probes"
METHODS = "analysis/probes/test_methods.py::"
TRAINED = "rpc/test_probe_service.py::"
SERVED = "engine/test_probes_served.py::"
ARTIFACT = "artifacts/test_probes.py::"

PROBES = [
    Mutant(
        "code-knows-the-block",
        TRAINING + "code_length",
        "fit = method.fit(x[:start], y[:start], n_classes, strength)",
        "fit = method.fit(x[:end], y[:end], n_classes, strength)",
        "labels are sent by what was learned from them",
        (METHODS + "test_the_online_code_is_the_sum_of_its_blocks",),
    ),
    Mutant(
        "windows-tell-their-document",
        TRAINING + "code_length",
        "np.unique(examples.documents, return_index=True, return_inverse=True)",
        "np.unique(np.arange(len(examples)), return_index=True, return_inverse=True)",
        "windows of one document are sent apart, and random labels of documents get short",
        (METHODS + "test_windows_of_one_document_do_not_tell_each_others_labels",),
    ),
    Mutant(
        "folds-of-windows",
        TRAINING + "fitting",
        "documents, first = np.unique(examples.documents, return_index=True)",
        "examples = Examples(examples.y, np.arange(len(examples)), examples.n_classes)\n"
        "    documents, first = np.unique(examples.documents, return_index=True)",
        "windows of one document are in several folds",
        (METHODS + "test_windows_of_one_document_are_in_one_fold",),
    ),
    Mutant(
        "other-states-standardised-anew",
        TRAINING + "fitting",
        "x = (states - self.mean) / self.scale\n        found",
        "x = (states - states.mean(axis=0)) / self.scale\n        found",
        "states that are judged are centred by their own mean",
        (METHODS + "test_other_states_are_standardised_as_the_training_texts_are",),
    ),
    Mutant(
        "calibrated-by-the-training-texts",
        TRAINING + "job",
        "_scored(probe, found, rows, CALIBRATION)",
        "_scored(probe, found, rows, TRAINING)",
        "the calibration is of the texts that the probe was fitted to, where it is too sure",
        (TRAINED + "test_a_probe_of_two_layers_is_that_of_scikit_learn_on_the_same_texts",),
    ),
    Mutant(
        "reported-on-the-calibrating-texts",
        TRAINING + "job",
        "_scored(probe, found, rows, REPORT)",
        "_scored(probe, found, rows, CALIBRATION)",
        "the report is of texts that the calibration has seen",
        (TRAINED + "test_a_probe_of_two_layers_is_that_of_scikit_learn_on_the_same_texts",),
    ),
    Mutant(
        "layer-by-the-training-texts",
        TRAINING + "job",
        "others, judged = found.part(CALIBRATION)",
        "others, judged = found.part(TRAINING)",
        "the layer is chosen by texts that its probe was fitted to",
        (TRAINED + "test_without_layers_the_one_that_reads_the_calibrating_texts_best_is_taken",),
    ),
    Mutant(
        "controls-keep-their-labels",
        TRAINING + "job",
        "generator.permutation(examples.y[first])[of]",
        "examples.y[first][of]",
        "the control task is the task itself",
        (TRAINED + "test_selectivity_is_what_is_left_beyond_labels_that_were_dealt_anew",),
    ),
    Mutant(
        "controls-of-windows",
        TRAINING + "job",
        "generator.permutation(examples.y[first])[of]",
        "generator.permutation(examples.y[of.argsort(kind='stable')])",
        "windows of one document get labels of their own",
        (METHODS + "test_labels_are_dealt_anew_to_documents_and_not_to_their_windows",),
    ),
    Mutant(
        "report-within-the-training",
        TRAINING + "texts",
        "held_out(np.where(out, labels, UNLABELLED), 0.5, seed + 1)",
        "held_out(labels, 0.5, seed + 1)",
        "texts of the report are taken from all, and train no more",
        (TRAINED + "test_ridge_reads_the_numbers_that_the_labels_are",),
    ),
    Mutant(
        "base-rate-of-the-reported",
        TRAINING + "report",
        "base_rate=float((y == counts.argmax()).mean())",
        "base_rate=float(np.bincount(y.astype(np.int64)).max() / len(y))",
        "the base rate knows the most frequent label of the report",
        (METHODS + "test_the_report_is_what_scikit_learn_measures",),
    ),
    Mutant(
        "prototypes-without-their-length",
        TRAINING + "prototype",
        "-np.square(centres).sum(axis=1) / strength",
        "np.zeros(len(centres))",
        "the class mean with the largest projection wins, and not the nearest",
        (METHODS + "test_prototypes_prefer_the_nearest_centroid_of_scikit_learn",),
    ),
    Mutant(
        "probe-of-centred-states",
        STORED,
        "bias = bias - sum(weights[layer] @ standardised[layer][0] for layer in layers)",
        "bias = bias - 0.0",
        "a stored probe forgets the mean that it was trained without",
        (ARTIFACT + "test_a_logistic_probe_of_two_layers_gives_the_probabilities_of_scikit_learn",),
    ),
    Mutant(
        "others-share-all",
        STORED,
        "* (1.0 - target)[:, None]",
        "* 1.0",
        "probabilities of all labels have a sum above 1",
        (ARTIFACT + "test_calibration_moves_the_log_odds_of_the_target_and_leaves_the_proportions_of_the_others",),
    ),
    Mutant(
        "condition-on-the-logit-itself",
        KIND,
        "projection = (level - score.bias) / float(length)",
        "projection = (level + score.bias) / float(length)",
        "the bias of a probe moves its threshold the other way",
        (SERVED + "test_the_projection_of_a_condition_is_where_the_probability_is_the_threshold",),
    ),
    Mutant(
        "below-is-above",
        KIND,
        "sign = 1.0 if condition.comparison is Comparison.ABOVE else -1.0",
        "sign = 1.0",
        "a condition below a probability holds above it",
        (SERVED + "test_a_stream_ends_where_the_probability_crosses_the_threshold",),
    ),
    Mutant(
        "target-first",
        KIND,
        "(own, other) if self.place == 0 else (other, own)",
        "(own, other)",
        "of two labels the target is always the first",
        (SERVED + "test_probabilities_and_gates_are_those_of_the_formula_in_a_mixed_batch",),
    ),
    Mutant(
        "layers-summed-by-label",
        KIND,
        "np.array(numbers).reshape(self.lengths.shape)",
        "np.array(numbers).reshape(self.lengths.shape[::-1]).T",
        "projections of one layer are taken for those of another label",
        (SERVED + "test_probabilities_and_gates_are_those_of_the_formula_in_a_mixed_batch",),
    ),
]
