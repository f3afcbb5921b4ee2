"""Alert and recording rules: sound, tested by promtool, asking for what the server exports, each with a runbook."""

import re
import subprocess

import pytest
import yaml
from deployed import DEPLOY, RULE_TESTS, RULES, Query, program, rule_queries, rules

ALERTS = {rule["alert"]: rule for rule in rules("alert")}
RECORDED = {rule["record"] for rule in rules("record")}


def promtool(*arguments: object) -> str:
    done = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration_and_every_rule():
    assert f"{len(RULES)} rule files found" in promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_the_unit_tests_of_the_rules_pass():
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)


def test_every_alert_has_a_unit_test_in_which_it_fires():
    fires = set(re.findall(r'alertname="(\w+)", alertstate="firing"', RULE_TESTS.read_text()))
    fires |= {
        case["alertname"]
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert fires == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_leads_to_its_entry_in_the_runbook(name: str):
    annotations = ALERTS[name]["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert annotations["runbook"] == f"deploy/README.md#{name.lower()}"
    headings = re.findall(r"^#+ (.+)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert name in headings
    assert ALERTS[name]["labels"]["severity"] in ("critical", "warning")


@pytest.mark.parametrize("query", rule_queries(), ids=lambda query: query.where)
def test_every_rule_asks_for_what_the_server_exports(query: Query, exported: set[str]):
    assert query.metrics or "up{" in query.expression
    assert query.metrics - RECORDED <= exported
