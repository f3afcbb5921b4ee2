"""Started watches are kept in the artifact store, so that every server of a model that shares it runs them.

    watches/<model>/<name>                          the record: watch, options, reference, and a revision of its own
    watch_references/<model>/<name>.<revision>      a reference that came later
    watch_replicas/<model>/<replica>                what a server says of the watches it found

The store decides. A start writes the record where there is none: of two servers that start one name at once, one is
refused. A stop removes it. Every server looks every few seconds: it runs what it finds, stops what is gone, and where
the revision has changed it stops the old watch and runs the new one. Nothing is ever written into an existing record,
so that no late write brings a stopped watch back. A crash loses nothing: what is in the store runs again, and what is
not was never reported as started.

A watch that a server was configured with (--watch) is that server's own: it is not in the store, and it runs there
instead of one of the same name in the store.
"""

import hashlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound, RequestError, ResourceExhausted
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.stored import WatchAsked, start_stored
from patchclamp_server.monitoring.stored_run import Report, Said, StoredRun

log = logging.getLogger(__name__)
# A report is renewed after so long, and no longer believed after three times as long.
REPORT_SECONDS = 30.0
FORGET_SECONDS = 86_400.0


@dataclass(frozen=True)
class Replica:
    """What a server reported of one watch."""

    name: str
    said: Said
    reported: float


@dataclass(frozen=True)
class Listed:
    """A watch that runs here or is in the store. `run` is its record, None for one of the server's own; `here` is None
    where it does not run, for the `reason`. `replicas` has this server first."""

    name: str
    here: RunningWatch | None
    run: StoredRun | None
    reason: str = ""
    replicas: tuple[Replica, ...] = ()


class SharedWatches:
    """May be used from any thread. `on_stopped` is told of watches that end because the store says so."""

    def __init__(
        self,
        registry: WatchRegistry,
        store: ArtifactStore,
        info: ModelInfo,
        on_stopped: Callable[[RunningWatch], None] = lambda watch: None,
    ) -> None:
        self.replica = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._registry, self._store, self._info = registry, store, info
        self._on_stopped = on_stopped
        model = hashlib.sha256(info.fingerprint.encode()).hexdigest()[:32]
        self._records = store.records(f"watches/{model}")
        self._references = store.records(f"watch_references/{model}")
        self._replicas = store.records(f"watch_replicas/{model}")
        # This is held while watches start and stop: a look at the store must not see half of a start.
        self._lock = threading.Lock()
        self._own: set[str] = set()
        # These are the watches that run here for the store, and those that cannot.
        self._runs: dict[str, StoredRun] = {}
        self._refused: dict[str, tuple[StoredRun | None, str]] = {}
        self._reported: Report | None = None

    @property
    def refused(self) -> int:
        """The number of watches of the store that cannot run here."""
        return len(self._refused)

    def start_own(self, asked: WatchAsked) -> RunningWatch:
        """Starts a watch of this server alone. Raises the errors of start_stored."""
        with self._lock:
            running = start_stored(self._registry, asked, self._store, self._info)
            self._own.add(running.name)
        return running

    def start(self, asked: WatchAsked) -> RunningWatch:
        """Starts a watch here, and on all servers of the store. Raises the errors of start_stored; FailedPrecondition
        where the name is in use; ResourceExhausted where the store is full."""
        with self._lock:
            running = start_stored(self._registry, asked, self._store, self._info)
            run = StoredRun.of(running)
            created = False
            try:
                created = self._records.create(running.name, run.to_json())
            finally:
                if not created:
                    self._registry.stop(running.name)
            if not created:
                message = f"a watch named {running.name!r} is running on a server of this store; stop it first"
                raise FailedPrecondition("name", message)
            self._runs[running.name] = run
            self._refused.pop(running.name, None)
            self._report()
        return running

    def stop(self, name: str) -> Listed:
        """Stops a watch here and on all servers of the store, and returns it as it was. Raises NotFound."""
        with self._lock:
            if name in self._own:
                self._own.discard(name)
                return Listed(name, self._registry.stop(name), None)
            run = self._runs.pop(name, None)
            if run is None:
                contents = self._records.read()
                if name not in contents:
                    raise NotFound("name", f"no watch named {name!r} is running")
                with suppress(InvalidArgument):  # a damaged record is removed all the same
                    run = StoredRun.from_json(name, contents[name])
            self._records.remove(name)
            if run is not None:
                self._references.remove(f"{name}.{run.revision}")
            reason = self._refused.pop(name, (None, ""))[1]
            here = self._registry.stop(name) if self._runs_here(name) else None
            self._report()
        return Listed(name, here, run, reason)

    def use_reference(self, name: str, reference: Reference, reference_id: str) -> None:
        """Measures drift against this reference, on all servers of the store. Raises the errors of set_reference."""
        with self._lock:
            self._registry.set_reference(name, reference, reference_id)
            run = self._runs.get(name)
            if run is not None:
                self._references.write(f"{name}.{run.revision}", {"reference": reference_id})
                self._runs[name] = replace(run, reference=reference_id)

    def look(self) -> None:
        """Runs and stops what the store says. Raises OSError where the store cannot be read; then nothing changes."""
        with self._lock:
            if self._registry.ended:
                return
            found: dict[str, StoredRun] = {}
            refused: dict[str, tuple[StoredRun | None, str]] = {}
            references = self._references.read()
            for name, content in self._records.read().items():
                try:
                    found[name] = _with_reference(StoredRun.from_json(name, content), references)
                except RequestError as error:
                    refused[name] = None, str(error)
            for name, run in list(self._runs.items()):
                if name not in found or found[name].revision != run.revision:
                    self._end(name)
            for name, run in found.items():
                reason = self._reason_not_to_run(name, run)
                if reason:
                    refused[name] = run, reason
            for name, (_, reason) in refused.items():
                if self._refused.get(name, (None, ""))[1] != reason:
                    log.warning("the watch %r of the store does not run here: %s", name, reason)
            self._refused = refused
            self._report()

    def _reason_not_to_run(self, name: str, run: StoredRun) -> str:
        """Starts the watch, or gives it its new reference, and returns "", or the reason why it cannot."""
        if name in self._own:
            return "this server is configured with a watch of that name (--watch)"
        try:
            if name not in self._runs:
                asked = WatchAsked(run.watch, run.options, run.reference)
                start_stored(self._registry, asked, self._store, self._info)
            elif self._runs[name].reference != run.reference:
                artifact = Resolver(self._info, self._store).artifact(
                    run.reference, ArtifactKind.WATCH_REFERENCE, "reference"
                )
                self._registry.set_reference(name, Reference.from_tensors(artifact.tensors), artifact.info.id)
        except RequestError as error:
            return str(error)
        self._runs[name] = run
        return ""

    def _end(self, name: str) -> None:
        del self._runs[name]
        if self._runs_here(name):
            self._on_stopped(self._registry.stop(name))

    def _runs_here(self, name: str) -> bool:
        return any(running.name == name for running in self._registry.running())

    def listing(self) -> list[Listed]:
        """Returns what runs here in the order of its start, and then what does not."""
        running = {each.name: each for each in self._registry.running()}
        with self._lock:
            runs, refused = dict(self._runs), dict(self._refused)
        reports = self._believed()
        listed = []
        for name, here in running.items():
            replicas = self._said_of(name, Said("", here.tokens), reports) if name in runs else ()
            listed.append(Listed(name, here, runs.get(name), replicas=replicas))
        for name, (run, reason) in refused.items():
            if name not in running:
                listed.append(Listed(name, None, run, reason, self._said_of(name, Said(reason, 0), reports)))
        return listed

    def _said_of(self, name: str, here: Said, reports: list[Report]) -> tuple[Replica, ...]:
        others = [
            Replica(report.replica, report.watches[name], report.reported)
            for report in reports
            if name in report.watches and report.replica != self.replica
        ]
        return Replica(self.replica, here, time.time()), *others

    def _believed(self) -> list[Report]:
        """Returns the reports that are not too old. What a crashed server left behind is removed after a day."""
        believed, now = [], time.time()
        for name, content in sorted(self._replicas.read().items()):
            report = Report.from_json(content)
            if report is not None and now - report.reported < 3.0 * REPORT_SECONDS:
                believed.append(report)
            elif report is None or now - report.reported > FORGET_SECONDS:
                self._replicas.remove(name)
        return believed

    def _report(self) -> None:
        """Writes a report; one that cannot be written is missing in the listings of others, and nothing else."""
        try:
            self._write_report()
        except (OSError, ResourceExhausted) as error:
            log.warning("this server cannot tell the store of its watches: %s", error)

    def _write_report(self) -> None:
        """Writes a report when something has changed, or the last one gets old. Without watches there is none."""
        tokens = {each.name: each.tokens for each in self._registry.running()}
        watches = {name: Said("", tokens.get(name, 0)) for name in self._runs}
        watches |= {name: Said(reason, 0) for name, (_, reason) in self._refused.items()}
        last = self._reported
        if not watches:
            if last is not None:
                self._replicas.remove(self.replica)
                self._reported = None
            return
        reasons = {name: said.reason for name, said in watches.items()}
        known = {} if last is None else {name: said.reason for name, said in last.watches.items()}
        if last is None or reasons != known or time.time() - last.reported >= REPORT_SECONDS:
            self._reported = Report(self.replica, watches)
            self._replicas.write(self.replica, self._reported.to_json())

    def close(self) -> None:
        """Withdraws this server's report; the watches stay in the store."""
        with self._lock:
            if self._reported is not None:
                self._replicas.remove(self.replica)
                self._reported = None


def _with_reference(run: StoredRun, references: dict[str, object]) -> StoredRun:
    later = references.get(f"{run.options.name}.{run.revision}")
    reference = later.get("reference") if isinstance(later, dict) else None
    return replace(run, reference=reference) if isinstance(reference, str) else run
