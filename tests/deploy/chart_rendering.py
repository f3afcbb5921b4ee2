"""The chart as Helm itself renders it: a wheel brings Helm's own library. Where there is none the tests are skipped.

In a process of its own, because the library's runtime (Go) would stay in this one with threads and signal handlers.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml
from deployed import DEPLOY

if not os.environ.get("CI") and importlib.util.find_spec("helm_python") is None:
    pytest.skip("helm-python-sdk has no wheel for this machine", allow_module_level=True)

CHART = DEPLOY / "helm" / "patchclamp"
RENDER = """
import json, sys
import helm_python as helm

asked = json.load(sys.stdin)
with helm.Chart.load(asked["chart"]) as chart:
    try:
        answer = {"files": chart.render(asked["values"], name=asked["release"], namespace="models")}
    except helm.HelmError as error:
        answer = {"error": str(error)}
print(json.dumps(answer))
"""
LINT = """
import json, sys
import helm_python as helm

print(json.dumps(helm.lint(json.load(sys.stdin)["chart"])))
"""


class Refused(Exception):
    """What Helm says of values it does not render."""


def rendered_files(values: dict[str, Any], release: str = "demo") -> dict[str, str]:
    """{template: text} as `helm template` makes it. Raises Refused."""
    answer = _helm(RENDER, json.dumps({"chart": str(CHART), "values": values, "release": release}))
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["files"]


def render(values: dict[str, Any], release: str = "demo") -> dict[tuple[str, str], dict[str, Any]]:
    """{(kind, name): manifest}. Raises Refused."""
    texts = [text for name, text in rendered_files(values, release).items() if not name.endswith(".txt")]
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def lint() -> list[dict[str, Any]]:
    """Findings of `helm lint`: severity 1 is a hint, 2 a warning, 3 an error."""
    return _helm(LINT, json.dumps({"chart": str(CHART)}))["messages"]


@functools.cache
def _helm(script: str, asked: str) -> Any:
    done = subprocess.run([sys.executable, "-c", script], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
