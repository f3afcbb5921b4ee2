"""These metrics show Prometheus the steering: which kinds of edits run, how often gates open, what they change."""

import math
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from patchclamp_server.interventions.edit_kinds import NAMES, kind_name
from patchclamp_server.interventions.program import Edit, Receipt
from patchclamp_server.interventions.request_warnings import WarningCode

CHANGE_BUCKETS = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0, 100.0)


class InterventionMetrics:
    """Counts served requests; the edits of analysis jobs are not counted. Kinds and codes are there from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "patchclamp_edited_requests_total", "Requests that ran with edits and have ended.", registry=registry
        )
        self._edits = Counter(
            "patchclamp_edits_total", "Edits of those requests, by kind.", ("kind",), registry=registry
        )
        self._openings = Counter(
            "patchclamp_gate_openings_total",
            "Tokens in the scope of an edit at which its gate was open, counted at each layer of the edit.",
            registry=registry,
        )
        self._change = Histogram(
            "patchclamp_edit_change_ratio",
            "Mean of |delta| / |h| of an edit over the rows that its request computed.",
            buckets=CHANGE_BUCKETS,
            registry=registry,
        )
        self.aborted = Counter(
            "patchclamp_aborted_requests_total", "Requests that an abort condition ended.", registry=registry
        )
        self.warnings = Counter(
            "patchclamp_request_warnings_total",
            "Warnings in the receipts of requests, by code.",
            ("code",),
            registry=registry,
        )
        for kind in NAMES.values():
            self._edits.labels(kind)
        for code in WarningCode:
            self.warnings.labels(code.value)

    def count(self, edits: Sequence[Edit], receipt: Receipt | None) -> None:
        self._requests.inc()
        for edit in edits:
            self._edits.labels(kind_name(edit.kind)).inc()
        for own in receipt.edits if receipt is not None else ():
            self._openings.inc(own.gate_firings)
            if own.rows and math.isfinite(own.mean_relative_change):
                self._change.observe(own.mean_relative_change)
