"""Where the files of deploy/ are, and what its rules and dashboards ask of Prometheus."""

import json
import os
import re
import shutil
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchclamp_server.cli.options import add_serve_arguments

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
RULE_TESTS = DEPLOY / "prometheus" / "tests" / "alerts.yml"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
# Variables of Grafana, as they are once everything is chosen.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h"}
METRIC = re.compile(r"\b(?:[a-z_]+:)?patchclamp_[a-z0-9_]+(?::[a-z0-9_]+)?")


@dataclass(frozen=True)
class Query:
    """`where`: rule, or dashboard and panel."""

    where: str
    expression: str

    @property
    def metrics(self) -> set[str]:
        """Names of our metrics and of recorded ones."""
        return set(METRIC.findall(self.expression))


def program(name: str) -> str:
    """`prometheus` or `promtool`: beside this Python, else on PATH. Without it the test is skipped, in CI it fails."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        missing = f"{name} is not installed: `.ci/prometheus VENV` fetches it where there is apt"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def server_variables() -> set[str]:
    """What `patchclamp serve` reads from its environment."""
    parser = ArgumentParser()
    add_serve_arguments(parser)
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    return {"PATCHCLAMP_" + option[2:].replace("-", "_").upper() for option in options}


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: "alert" or "record"."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def rule_queries() -> list[Query]:
    return [Query(rule[kind], rule["expr"]) for kind in ("record", "alert") for rule in rules(kind)]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return json.loads(dashboard.read_text())["panels"]


def dashboard_queries() -> list[Query]:
    """What every panel asks, for all servers."""
    return [
        Query(f"{path.stem}: {panel['title']}", resolved(target["expr"]))
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel.get("targets", ())
    ]


def resolved(expression: str, **chosen: str) -> str:
    """An expression of a dashboard with its variables replaced: all of everything, unless chosen.

    ".+" and not ".*", which a label that does not exist would match.
    """
    for variable, value in {**VARIABLES, **{f"${name}": value for name, value in chosen.items()}}.items():
        expression = expression.replace(variable, value)
    return re.sub(r'"\$[a-z_]+"', '".+"', expression)
