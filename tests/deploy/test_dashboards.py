"""Grafana's dashboards: well-formed, their queries valid, and asking for what the server exports."""

import json
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import DASHBOARDS, DEPLOY, Query, dashboard_queries, panels, program, resolved, rules
from prometheus_client import CollectorRegistry

from patchclamp_server.rpc.metrics.interventions import InterventionMetrics

RECORDED = {rule["record"] for rule in rules("record")}
# Units that Grafana knows, of those that we use.
UNITS = {"none", "short", "s", "percentunit", "ops", "reqps", "bytes"}
COLUMNS = 24
each = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_every_dashboard_has_an_address_and_a_title_of_its_own():
    for key in ("uid", "title"):
        values = [read(path)[key] for path in DASHBOARDS]
        assert len(set(values)) == len(values) == 3


@each
def test_panels_have_unique_ids_a_unit_and_a_description(path: Path):
    ids = [panel["id"] for panel in panels(path)]
    assert len(set(ids)) == len(ids)
    for panel in panels(path):
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
            assert panel["description"].endswith("."), panel["title"]
            assert panel["targets"], panel["title"]


@each
def test_panels_lie_in_the_grid_and_do_not_overlap(path: Path):
    places = [panel["gridPos"] for panel in panels(path)]
    assert all(place["x"] + place["w"] <= COLUMNS for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


@each
def test_everything_is_asked_of_the_chosen_data_source(path: Path):
    dashboard = read(path)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    asking = [target for panel in panels(path) for target in panel.get("targets", ())]
    asking += [variable for variable in variables.values() if variable["type"] == "query"]
    assert {thing["datasource"]["uid"] for thing in asking} == {"${datasource}"}


@each
def test_every_variable_that_is_used_is_there(path: Path):
    known = {variable["name"] for variable in read(path)["templating"]["list"]}
    for panel in panels(path):
        for target in panel.get("targets", ()):
            left = resolved(target["expr"], **dict.fromkeys(known, "chosen"))
            assert "$" not in left, (panel["title"], left)


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.where)
def test_every_panel_asks_for_what_the_server_exports(query: Query, exported: set[str]):
    assert query.metrics - RECORDED <= exported


@each
def test_variables_are_filled_from_what_the_server_exports(path: Path, exported: set[str]):
    for variable in read(path)["templating"]["list"]:
        if variable["type"] == "query":
            metric = variable["definition"].removeprefix("label_values(").partition(",")[0]
            assert metric in exported


def test_every_metric_of_steering_is_on_the_dashboard_of_interventions():
    registry = CollectorRegistry()
    InterventionMetrics(registry)
    [path] = [path for path in DASHBOARDS if path.stem == "interventions"]
    asked = " ".join(target["expr"] for panel in panels(path) for target in panel.get("targets", ()))
    assert {family.name for family in registry.collect() if family.name not in asked} == set()


def test_promtool_parses_every_query(tmp_path: Path):
    queries = [{"record": f"panel:{i}", "expr": query.expression} for i, query in enumerate(dashboard_queries())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": queries}]}))
    done = subprocess.run([program("promtool"), "check", "rules", file], capture_output=True, text=True, check=False)
    assert f"{len(queries)} rules found" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_is_given_the_dashboards_and_the_data_source():
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    [provider] = yaml.safe_load((provisioning / "dashboards" / "patchclamp.yaml").read_text())["providers"]
    mounts = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"../grafana/dashboards:{provider['options']['path']}:ro" in mounts
