"""Defects in watches."""

from planted.mutant import Mutant

REFERENCE = "patchclamp_server.monitoring.reference"
RAMP = "monitoring/test_watch_statistics.py::test_the_sample_of_a_long_recording_is_of_all_of_it"

MONITORING = [
    Mutant(
        "reservoir-of-the-latest",
        REFERENCE,
        "place = self._random.integers(0, number + 1)",
        "place = number % room",
        "a reference keeps the latest tokens",
        (RAMP,),
    ),
    Mutant(
        "reservoir-of-any-place",
        REFERENCE,
        "place = self._random.integers(0, number + 1)",
        "place = self._random.integers(0, room, len(number))",
        "a reference keeps late tokens rather than early ones",
        (RAMP,),
    ),
    Mutant(
        "reservoir-of-the-first",
        REFERENCE,
        "            self._kept[at] = row",
        "            pass",
        "a reference keeps the first tokens",
        (RAMP,),
    ),
    Mutant(
        "noise-of-an-endless-reference",
        "patchclamp_server.monitoring.drift",
        "(inflation * (1.0 / n + 1.0 / m))",
        "(inflation * (1.0 / n))",
        "the noise of the reference itself is taken for drift",
        ("monitoring/test_watch_statistics.py::test_two_samples_of_one_distribution_have_no_drift_beyond_their_noise",),
    ),
    Mutant(
        "fires-at-its-threshold",
        "patchclamp_server.monitoring.accumulator",
        "above += v > threshold",
        "above += v >= threshold",
        "a value at the threshold fires",
        (
            "monitoring/test_watch_statistics.py::test_an_edge_between_two_float32_counts_as_the_number_it_is",
            "monitoring/test_watch_statistics.py::"
            "test_sums_and_histograms_are_those_of_numpy_over_columns_in_any_order[compiled]",
        ),
    ),
    Mutant(
        "buckets-lost-with-new-edges",
        "patchclamp_server.monitoring.accumulator",
        "self.sums.bucket_counts[:] += counted if self.compiled else torch.from_numpy(counted).to(self.device)",
        "pass",
        "what buckets have counted is lost when a reference comes",
        (
            "monitoring/test_watch_statistics.py::"
            "test_new_edges_begin_a_new_histogram_and_leave_the_buckets_as_they_are",
        ),
    ),
    Mutant(
        "window-that-never-ends",
        "patchclamp_server.monitoring.running",
        "self._filled, self._before = 0, counted",
        "self._filled = 0",
        "the second window has the first one in it",
        (
            "monitoring/test_watch_registry.py::test_drift_is_none_before_a_window_0_on_what_was_recorded_and_large_on_what_is_shifted",
        ),
    ),
    Mutant(
        "sinks-are-watched",
        "patchclamp_server.monitoring.step",
        "if not position:",
        "if False:",
        "the first token of a sequence is in every figure",
        ("monitoring/test_watched_values.py::test_values_after_all_edits_in_a_mixed_batch_with_chunked_prefill",),
    ),
    Mutant(
        "recomputed-tokens-are-watched",
        "patchclamp_server.monitoring.step",
        "for i in range(max(0, span.fresh - span.position), len(span.token_ids)):",
        "for i in range(len(span.token_ids)):",
        "a token that is computed again is counted again",
        ("monitoring/test_watched_values.py::test_a_token_that_is_computed_again_after_a_preemption_is_seen_once",),
    ),
]
