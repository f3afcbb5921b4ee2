"""A real Prometheus scrapes a server under load: its rules and dashboards have values, and a planted drift alarms."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from deployed import Query, dashboard_queries, rules
from live import LiveServer
from live_prometheus import RANGE, LivePrometheus, until

from patchclamp import Client
from patchclamp.monitoring import watch_direction
from patchclamp.programs import add, scale_neurons
from patchclamp.sparsity import QualityGuard, Sparsity, cats
from patchclamp_server.model.load import load_model

WIDTH = 32
DIRECTION = [1.0 if i % 2 else -1.0 for i in range(WIDTH)]
# What the drift is planted with: far outside of what the model does by itself.
PUSH = add([20.0 * x for x in DIRECTION], layers=0, name="push")
PROMPTS = ("good morning", "the weather is", "one two three", "a long way")
TOKENS = 16
WINDOW = len(PROMPTS) * TOKENS * 2
# Panels of what this load does not have: faults, refusals, sessions, grounding, and a server that checks tokens.
SILENT = {
    "serving: Turned away",
    "serving: Calls by tenant",
    "interventions: Interactive sessions",
    "interventions: Ended by abort_when",
    "interventions: Tokens copied from the prompt",
}


# An edit to be counted, which changes nothing.
UNMOVED = scale_neurons([0], 1.0, layers=0)


class Load:
    """Requests without a pause: the same prompts over and over, under a program that can be changed."""

    def __init__(self, address: str) -> None:
        self.program: list[Any] = [UNMOVED]
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: Exception | None = None

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        assert self._failure is None, self._failure

    def _run(self) -> None:
        sparsity = Sparsity(policy=cats(keep_ratio=0.5), guard=QualityGuard(sample_rate=1.0, max_divergence=1e6))
        try:
            with Client(self._address) as client:
                while not self._ended.is_set():
                    for prompt in PROMPTS:
                        client.generate(
                            prompt, program=self.program, sparsity=sparsity, max_tokens=TOKENS, ignore_eos=True
                        ).result()
                    list(client.list_artifacts())
        except Exception as error:
            self._failure = error


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("scraped_artifacts")) as live:
        yield live


@pytest.fixture(scope="module")
def load(server: LiveServer) -> Iterator[Load]:
    """With a watch, whose reference is what the model does under this load."""
    with Load(server.address) as load, Client(server.address) as client:
        client.create_watch([watch_direction("push", DIRECTION, layers=1)], tags=["pushed"])
        client.start_watch("pushed", window_tokens=WINDOW, calibration_tokens=16, export_items=True)
        client.record_reference("pushed", tokens=4 * WINDOW, use=True).result()
        yield load


@pytest.fixture(scope="module")
def prometheus(server: LiveServer, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePrometheus]:
    target = f"127.0.0.1:{server.server.metrics_port}"
    with LivePrometheus(tmp_path_factory.mktemp("prometheus"), target) as prometheus:
        yield prometheus


def test_the_server_is_a_target_that_is_up(prometheus: LivePrometheus):
    [target] = until(lambda: _scraped(prometheus), "a scrape")
    assert (target["labels"]["job"], target["health"], target["lastError"]) == ("patchclamp", "up", "")


def test_every_rule_is_evaluated_without_an_error_and_none_alarms(prometheus: LivePrometheus):
    names = {rule.get("alert") or rule["record"] for rule in rules("alert") + rules("record")}
    found = until(lambda: _all_evaluated(prometheus), "every rule is evaluated")
    assert set(found) == names
    assert {name: rule.get("lastError") for name, rule in found.items() if rule["health"] != "ok"} == {}
    until(lambda: not prometheus.ask("alerts")["alerts"], "nothing alarms")


@pytest.mark.parametrize("name", [rule["record"] for rule in rules("record")])
def test_a_recording_rule_has_values_under_load(prometheus: LivePrometheus, name: str):
    until(lambda: _values(prometheus, name), f"{name} has values")


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.where)
def test_a_panel_shows_something_under_load(prometheus: LivePrometheus, query: Query):
    expression = query.expression.replace("[5m]", f"[{RANGE}]")
    if query.where in SILENT:
        assert isinstance(prometheus.query(expression), list)
    else:
        until(lambda: prometheus.query(expression), f"{query.where}: {expression}")


def test_a_planted_drift_alarms_and_the_alarm_ends_with_it(prometheus: LivePrometheus, load: Load):
    alarms = prometheus.alertmanager.received

    def told(*, resolved: bool) -> dict[str, Any] | None:
        now = datetime.now(UTC)
        mean_drift = {"alertname": "PatchclampWatchDrift", "watch": "pushed", "statistic": "mean"}
        drifts = [alarm for alarm in alarms if mean_drift.items() <= alarm["labels"].items()]
        over = [alarm for alarm in drifts if (datetime.fromisoformat(alarm["endsAt"]) <= now) == resolved]
        return over[-1] if over else None

    assert told(resolved=False) is None
    load.program = [PUSH]
    alarm = until(lambda: told(resolved=False), "the drift alarms")
    assert alarm["annotations"]["runbook"] == "deploy/README.md#patchclampwatchdrift"
    assert "farther from their reference than by chance" in alarm["annotations"]["summary"]
    load.program = []
    until(lambda: told(resolved=True), "the alarm ends")
    until(lambda: not prometheus.ask("alerts")["alerts"], "nothing alarms")


def _scraped(prometheus: LivePrometheus) -> list[dict[str, Any]]:
    return [t for t in prometheus.ask("targets")["activeTargets"] if t["health"] != "unknown"]


def _all_evaluated(prometheus: LivePrometheus) -> dict[str, dict[str, Any]] | None:
    found = prometheus.rules()
    return found if all(rule["health"] != "unknown" for rule in found.values()) else None


def _values(prometheus: LivePrometheus, name: str) -> list[dict[str, Any]]:
    """Not NaN, which is what the quantile of nothing is."""
    return [sample for sample in prometheus.query(name) if sample["value"][1] != "NaN"]
