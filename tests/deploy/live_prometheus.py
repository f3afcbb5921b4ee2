"""A real Prometheus with the configuration and the rules of deploy/, seconds in place of minutes."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml
from deployed import DEPLOY, RULES, program

INTERVAL = "250ms"
RANGE = "3s"
HELD = "1s"
DEADLINE_SECONDS = 20.0


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE_SECONDS) -> Any:
    """The first value of `condition` that is true."""
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        pause.wait(0.1)
    return value


class Alertmanager:
    """Takes what Prometheus sends to an Alertmanager. `received`: alerts in the order of their arrival."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class LivePrometheus:
    """Scrapes the job patchclamp at `target`. Use as a context manager."""

    def __init__(self, directory: Path, target: str) -> None:
        self.alertmanager = Alertmanager()
        self._log = directory / "prometheus.log"
        (directory / "rules").mkdir()
        for path in RULES:
            (directory / "rules" / path.name).write_text(hastened(path.read_text()))
        config = directory / "prometheus.yml"
        config.write_text(yaml.safe_dump(configuration(target, self.alertmanager.address)))
        self._command = [
            program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]

    def __enter__(self) -> "LivePrometheus":
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self._url = until(self._address, "Prometheus listens")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()
        self.alertmanager.close()

    def _address(self) -> str | None:
        log = self._log.read_text()
        assert self._process.poll() is None, log
        found = re.search(r'msg="Listening on" address=(\S+)', log)
        return f"http://{found[1]}/api/v1/" if found and "Server is ready" in log else None

    def ask(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self._url}{path}?{urlencode(parameters)}") as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant vector now."""
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result

    def rules(self) -> dict[str, dict[str, Any]]:
        return {rule["name"]: rule for group in self.ask("rules")["groups"] for rule in group["rules"]}


def hastened(rules: str) -> str:
    """The same rules over seconds: what their unit tests check over minutes is the time they take."""
    return re.sub(r"\bfor: \d+m", f"for: {HELD}", re.sub(r"\[\d+m\]", f"[{RANGE}]", rules))


def configuration(target: str, alertmanager: str) -> dict[str, Any]:
    """prometheus.yml, with the addresses of this test and shorter intervals."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], INTERVAL)
    [job] = [job for job in config["scrape_configs"] if job["job_name"] == "patchclamp"]
    job["static_configs"] = [{"targets": [target]}]
    config["scrape_configs"] = [job]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return config
