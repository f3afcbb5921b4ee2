"""Defects in what judges vectors: calibration of a strength, and detection of a concept."""

from planted.mutant import Mutant

CALIBRATING = "patchclamp_server.analysis.steering.calibration."
DETECTING = "patchclamp_server.analysis.steering.detection."
CURVES = "analysis/steering/test_calibration_curves.py::"
CALIBRATED = "rpc/test_calibrate_vector.py::"
DETECTED = "rpc/test_detect_concept.py::"
QUALITY = "analysis/steering/test_detection_quality.py::"

CALIBRATION = [
    Mutant(
        "half-the-turn",
        CALIBRATING + "applications",
        "2.0 * math.asin(min(1.0, ratio / 2.0))",
        "math.asin(min(1.0, ratio / 2.0))",
        "rotations change half of what they are said to",
        (CURVES + "test_default_strengths_change_a_tenth_to_twice_the_norm",),
    ),
    Mutant(
        "norm-of-prompts-alike",
        CALIBRATING + "applications",
        "norms[layer] = sum(float(mean[0]) * n for mean, n in found) / sum(n for _, n in found)",
        "norms[layer] = sum(float(mean[0]) for mean, _ in found) / len(found)",
        "short prompts count as much as long ones in the norm that strengths are made of",
        (CALIBRATED + "test_without_strengths_the_change_is_a_tenth_to_twice_the_norm",),
    ),
    Mutant(
        "last-4-gram-forgotten",
        CALIBRATING + "coherence",
        "range(len(ids) - NGRAM + 1)",
        "range(len(ids) - NGRAM)",
        "the last 4-gram of a text is not counted",
        (CURVES + "test_repetition_counts_4_grams_that_came_before",),
    ),
    Mutant(
        "projection-at-the-last-layer",
        CALIBRATING + "effects",
        "layer = best if isinstance(best, int) and best in vector.info.layers else vector.info.layers[-1]",
        "layer = vector.info.layers[-1]",
        "the projection is not at the layer of the best evidence",
        (CALIBRATED + "test_the_projection_is_at_the_layer_of_the_best_evidence",),
    ),
    Mutant(
        "coherent-again",
        CALIBRATING + "knee",
        "                break\n",
        "                continue\n",
        "a strength beyond one that breaks the text is safe",
        (CURVES + "test_the_safe_range_ends_before_the_first_strength_that_breaks_the_text",),
    ),
    Mutant(
        "farthest-without-random-vectors",
        CALIBRATING + "knee",
        "key=lambda k: k.dose.effect - k.dose.random_effect",
        "key=lambda k: k.dose.effect",
        "a layer where every vector does as much is the best one",
        (CURVES + "test_the_best_layer_is_that_whose_knee_is_farthest_beyond_random_vectors",),
    ),
    Mutant(
        "repetition-unbounded",
        CALIBRATING + "job",
        "ratio <= job.max_perplexity_ratio and point.repetition.mean <= job.max_repetition",
        "ratio <= job.max_perplexity_ratio",
        "text that repeats itself passes for coherent",
        (CALIBRATED + "test_text_that_repeats_more_than_the_bound_ends_the_safe_range",),
    ),
    Mutant(
        "prompt-wins-where-it-loses",
        CALIBRATING + "job",
        "prompted.effect.mean > reached",
        "prompted.effect.mean < reached",
        "the prompt is said to win where the vector reaches more",
        (CALIBRATED + "test_the_prompt_wins_where_it_reaches_more_than_the_knee",),
    ),
    Mutant(
        "intervals-over-other-prompts",
        CALIBRATING + "points",
        ".view(-1, len(self.prompts), 2).sum(0)",
        ".view(len(self.prompts), -1, 2).sum(1)",
        "prompts are resampled with texts of other prompts among theirs",
        (CALIBRATED + "test_random_vectors_count_together_and_intervals_are_over_prompts",),
    ),
    Mutant(
        "scored-a-token-late",
        CALIBRATING + "texts",
        "self._scores.add(position - self._by, logprobs)",
        "self._scores.add(position - self._by + 1, logprobs)",
        "predictions of a steered text are compared a token apart",
        (CALIBRATED + "test_the_prompted_text_is_read_without_the_instruction",),
    ),
    Mutant(
        "classifier-judged-by-what-it-learned",
        CALIBRATING + "word_classifier",
        "self.heldout_accuracy = float(scores.mean())",
        "self.heldout_accuracy = float(_model().fit(texts, labels).score(texts, labels))",
        "held-out accuracy is that of the texts that were learned",
        (CURVES + "test_the_classifier_is_at_chance_on_held_out_texts_of_random_labels",),
    ),
    Mutant(
        "calibrated-by-what-is-reported",
        DETECTING + "job",
        "platt(scores[fits], is_target[fits])",
        "platt(scores[rest], is_target[rest])",
        "probabilities are fitted to the texts that they are reported on",
        (DETECTED + "test_a_detector_is_calibrated_by_some_texts_and_reported_on_the_others",),
    ),
    Mutant(
        "random-directions-turned-by-the-report",
        DETECTING + "job",
        "auroc(each[fits], is_target[fits]) >= 0.5",
        "auroc(each[rest], is_target[rest]) >= 0.5",
        "random directions are turned by the texts that they are reported on, and never below chance",
        (DETECTED + "test_a_detector_is_calibrated_by_some_texts_and_reported_on_the_others",),
    ),
    Mutant(
        "base-rate-of-the-report",
        DETECTING + "job",
        "base = float(is_target[fits].mean())",
        "base = float(is_target[rest].mean())",
        "the base rate knows the texts that it is compared on",
        (DETECTED + "test_a_detector_is_calibrated_by_some_texts_and_reported_on_the_others",),
    ),
    Mutant(
        "column-of-the-first-vector",
        DETECTING + "job",
        "own.append((at, slice(start, start + len(each))))",
        "own.append((at, slice(0, len(each))))",
        "detectors at one place all have the scores of the first",
        (DETECTED + "test_scores_are_projections_pooled_as_by_hooks",),
    ),
    Mutant(
        "windows-alike",
        DETECTING + "scores",
        "place[i] = (n * before + own * place[i]) / (n + own)",
        "place[i] = (before + place[i]) / 2",
        "the short last window of a text counts as much as the others",
        (DETECTED + "test_a_long_text_is_scored_over_all_its_windows",),
    ),
    Mutant(
        "threshold-splits-ties",
        DETECTING + "ranking",
        "area = (gained * (below + before / 2)).sum(1)",
        "area = (gained * (below + before)).sum(1)",
        "a target beats others of the same score",
        (QUALITY + "test_the_measures_of_a_ranking_are_those_of_scikit_learn",),
    ),
]
