"""A histogram that takes the observations of a step together, against one that takes them one by one."""

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from patchclamp_server.rpc.metrics.step_histogram import StepHistogram

BUCKETS = (0.01, 0.1, 1.0, 2.5)


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """By name and bound; when the histogram was made is not compared."""
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_observations_that_come_together_are_counted_as_if_they_had_come_one_by_one() -> None:
    together, single = CollectorRegistry(), CollectorRegistry()
    histogram = StepHistogram("waited_seconds", "How long.", BUCKETS, together)
    reference = Histogram("waited_seconds", "How long.", buckets=BUCKETS, registry=single)
    assert samples(together) == samples(single)
    random = np.random.default_rng(0)
    for n in (1, 0, 7, 300):
        # Bounds belong to the buckets that they end.
        values = [*random.exponential(0.5, n).tolist(), *BUCKETS]
        histogram.observe(values)
        for value in values:
            reference.observe(value)
    own, expected = samples(together), samples(single)
    assert abs(own.pop(("waited_seconds_sum", "")) - expected.pop(("waited_seconds_sum", ""))) < 1e-9
    assert own == expected


def test_it_is_written_as_prometheus_reads_histograms() -> None:
    registry = CollectorRegistry()
    StepHistogram("waited_seconds", "How long.", BUCKETS, registry).observe([0.05, 3.0])
    text = generate_latest(registry).decode()
    assert "# TYPE waited_seconds histogram" in text
    assert 'waited_seconds_bucket{le="0.1"} 1.0' in text
    assert 'waited_seconds_bucket{le="+Inf"} 2.0' in text
    assert "waited_seconds_count 2.0" in text
