"""The server's metrics for Prometheus have the prefix patchclamp_, base units and labels from closed sets only.

Counts kept by the engine itself are read at scrape time; latencies are observed where they happen.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from patchclamp_server.engine.admission import Reason
from patchclamp_server.engine.config import EngineStats
from patchclamp_server.engine.memory.plan import MemoryPlan
from patchclamp_server.engine.request import SparsityReport
from patchclamp_server.interventions.program import Edit, Receipt
from patchclamp_server.interventions.request_warnings import WarningCode
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.monitoring.prometheus import WatchCollector
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.rpc.metrics.interventions import InterventionMetrics
from patchclamp_server.rpc.metrics.step_histogram import StepHistogram
from patchclamp_server.security.metrics import SecurityMetrics

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
SHARE_BUCKETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DIVERGENCE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# These map a field of EngineStats to metric and help. Counters get the suffix _total.
STATS_GAUGES: dict[str, tuple[str, str]] = {
    "running": ("patchclamp_sequences_running", "Sequences that hold KV blocks."),
    "waiting": ("patchclamp_queue_waiting", "Sequences that wait for their first step, or for another one."),
    "kv_blocks_total": ("patchclamp_kv_blocks", "KV blocks there are."),
    "kv_blocks_free": ("patchclamp_kv_blocks_free", "KV blocks a new sequence could take."),
    "kv_blocks_cached": ("patchclamp_kv_blocks_cached", "KV blocks kept for their prefix."),
    "queue_kv_tokens": ("patchclamp_queue_kv_tokens", "Tokens of KV cache that waiting requests may need."),
    "program_rows": ("patchclamp_program_rows", "Rows of the device tables that running programs hold."),
}
STATS_COUNTERS: dict[str, tuple[str, str]] = {
    "steps": ("patchclamp_steps", "Forward passes."),
    "prefill_tokens": ("patchclamp_prefill_tokens", "Prompt tokens computed, each once."),
    "decode_tokens": ("patchclamp_decode_tokens", "Tokens generated."),
    "scored_tokens": ("patchclamp_scored_tokens", "Tokens whose log-probability was asked for."),
    "recomputed_tokens": ("patchclamp_recomputed_tokens", "Tokens computed again after a preemption."),
    "prefix_hit_tokens": ("patchclamp_prefix_cache_hit_tokens", "Prompt tokens reused from the prefix cache."),
    "preemptions": ("patchclamp_preemptions", "Sequences that lost their KV blocks and were computed again."),
    "failed_steps": ("patchclamp_failed_steps", "Forward passes that raised; their requests got an error."),
}


class Metrics:
    """Holds the metrics of one server, in a registry of their own. Implements EngineObserver."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.security = SecurityMetrics(self.registry)
        by_method = ("service", "method")
        self.requests = Counter(
            "patchclamp_requests_total", "Calls answered.", (*by_method, "code"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "patchclamp_request_seconds", "Time of a call.", by_method, buckets=REQUEST_BUCKETS, registry=self.registry
        )
        self.in_flight = Gauge(
            "patchclamp_requests_in_flight", "Calls not yet answered.", by_method, registry=self.registry
        )
        self.serving = Gauge(
            "patchclamp_serving",
            "1 while health says SERVING, else 0: a drain, a step that is late, the engine's end.",
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "patchclamp_step_seconds", "Time of a forward pass.", buckets=STEP_BUCKETS, registry=self.registry
        )
        self._batch_rows = Histogram(
            "patchclamp_batch_rows", "Token rows of a forward pass.", buckets=ROW_BUCKETS, registry=self.registry
        )
        self._decode_rows = Histogram(
            "patchclamp_batch_decode_rows",
            "Sequences that got a token from a forward pass.",
            buckets=(0, *ROW_BUCKETS),
            registry=self.registry,
        )
        self._first_token_seconds = Histogram(
            "patchclamp_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._inter_token_seconds = StepHistogram(
            "patchclamp_inter_token_seconds",
            "From one token of a sequence to its next.",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._finished = Counter(
            "patchclamp_sequences_finished_total",
            "Sequences by outcome: a finish reason, or the class of the error.",
            ("outcome",),
            registry=self.registry,
        )

        self._queue_wait_seconds = Histogram(
            "patchclamp_queue_wait_seconds",
            "From the arrival of a request to its first step.",
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._refused = Counter(
            "patchclamp_admission_refused_total",
            "Requests refused because the engine could not serve them in time.",
            ("reason",),
            registry=self.registry,
        )
        for reason in Reason:
            self._refused.labels(reason.value)

        by_policy = ("policy",)
        self._sparse_tokens = Counter(
            "patchclamp_sparse_tokens_total", "Tokens computed by a sparse policy.", by_policy, registry=self.registry
        )
        self._active_share = Histogram(
            "patchclamp_sparse_active_ratio",
            "Share of neurons or channels that a finished sparse request computed.",
            by_policy,
            buckets=SHARE_BUCKETS,
            registry=self.registry,
        )
        self._guard_divergence = Histogram(
            "patchclamp_sparse_guard_divergence_nats",
            "KL(dense || sparse) of the tokens that quality guards sampled.",
            by_policy,
            buckets=DIVERGENCE_BUCKETS,
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "patchclamp_sparse_fallbacks_total",
            "Sequences that a quality guard made dense.",
            by_policy,
            registry=self.registry,
        )

        self._grounded_ratio = Histogram(
            "patchclamp_grounded_ratio",
            "Share of the tokens of a finished request that retrieval heads copied from its prompt.",
            buckets=SHARE_BUCKETS,
            registry=self.registry,
        )

        self.interventions = InterventionMetrics(self.registry)

    def describe_model(self, info: ModelInfo) -> None:
        gauge = Gauge(
            "patchclamp_model_info",
            "The model that is served; always 1.",
            ("name", "architecture", "fingerprint", "dtype", "device", "activations"),
            registry=self.registry,
        )
        gauge.labels(info.name, info.architecture, info.fingerprint, info.dtype, info.device, info.activations).set(1)

    def describe_memory(self, plan: MemoryPlan) -> None:
        gauge = Gauge(
            "patchclamp_memory_planned_bytes",
            "Memory that serving was planned to take, before the weights were read.",
            ("part",),
            registry=self.registry,
        )
        for part, size in plan.parts.items():
            gauge.labels(part).set(size)

    def read_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Shows the engine's counts; `stats` is called at every scrape, on the scraper's thread."""
        self.registry.register(EngineCollector(stats))

    def read_watches(
        self, registry: WatchRegistry, dropped: Callable[[RunningWatch], int], refused: Callable[[], int]
    ) -> None:
        """Shows running watches. Both callables are called at every scrape, on the scraper's thread; `dropped` counts
        the events that readers did not get."""
        self.registry.register(WatchCollector(registry, dropped, refused))

    def on_step(self, *, seconds: float, rows: int, generated: int) -> None:
        self._step_seconds.observe(seconds)
        self._batch_rows.observe(rows)
        self._decode_rows.observe(generated)

    def on_first_token(self, seconds: float) -> None:
        self._first_token_seconds.observe(seconds)

    def on_inter_tokens(self, seconds: Sequence[float]) -> None:
        self._inter_token_seconds.observe(seconds)

    def on_finished(self, outcome: str) -> None:
        self._finished.labels(outcome).inc()

    def on_queue_wait(self, seconds: float) -> None:
        self._queue_wait_seconds.observe(seconds)

    def on_refused(self, reason: Reason) -> None:
        self._refused.labels(reason.value).inc()

    def on_preemption(self) -> None:
        """Does nothing, because the engine counts preemptions: see EngineCollector."""

    def on_grounded(self, ratio: float) -> None:
        self._grounded_ratio.observe(ratio)

    def on_sparse_finished(self, report: SparsityReport) -> None:
        self._sparse_tokens.labels(report.policy).inc(report.sparse_tokens)
        if report.sparse_tokens:
            self._active_share.labels(report.policy).observe(report.active_ratio)

    def on_guard_sample(self, policy: str, divergence: float) -> None:
        self._guard_divergence.labels(policy).observe(divergence)

    def on_sparse_fallback(self, policy: str) -> None:
        self._fallbacks.labels(policy).inc()

    def on_edited(self, edits: Sequence[Edit], receipt: Receipt | None) -> None:
        self.interventions.count(edits, receipt)

    def on_aborted(self) -> None:
        self.interventions.aborted.inc()

    def on_warning(self, code: WarningCode) -> None:
        self.interventions.warnings.labels(code.value).inc()


class EngineCollector(Collector):
    """Shows the engine's own counts, as they are when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (metric, text) in STATS_GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
        for name, (metric, text) in STATS_COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))

    def describe(self) -> Iterator[Metric]:
        """Describes metrics without values: registering must not ask an engine that has not started."""
        for metric, text in STATS_GAUGES.values():
            yield GaugeMetricFamily(metric, text)
        for metric, text in STATS_COUNTERS.values():
            yield CounterMetricFamily(metric, text)
