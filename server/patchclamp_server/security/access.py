"""This module checks what one call may do with the engine and the store by its tenant's rules, and records what it did.

`ACCESS` is the access of the running call: rpc/ sets it, and the threads and tasks of the call inherit it. The engine
and the store ask `CallersAccess`, so every RPC passes here, whatever it runs or reads.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import replace

from patchclamp_server.artifacts.access import Tags
from patchclamp_server.engine.request import Event, Finished, Request, Token
from patchclamp_server.errors import PermissionDenied, QuotaExceeded
from patchclamp_server.interventions.edit_kinds import inline_numbers, kind_name
from patchclamp_server.interventions.program import Edit
from patchclamp_server.security.policy import EditRules, matches
from patchclamp_server.security.record import CallRecord
from patchclamp_server.security.tenants import Tenant


class Access:
    """What one call may do, and what it did."""

    def __init__(self, tenant: Tenant, record: CallRecord) -> None:
        self.tenant = tenant
        self.record = record
        self._began = False
        # These are the artifacts that the call has been allowed to use, or has made itself.
        self._allowed: set[str] = set()

    def admit(self, request: Request) -> Request:
        """Checks the edits, and that tokens are left; returns the request with at most the allowed priority."""
        rules, bucket = self.tenant.rules, self.tenant.bucket
        if request.program is not None:
            check_edits(request.program.program.edits, rules.edits)
        self._check_tokens()
        generates = request.score_from is None

        def on_event(event: Event) -> None:
            if isinstance(event, Token) and generates:
                self.record.token()
                if bucket is not None:
                    bucket.charge(1)
            elif isinstance(event, Finished):
                self.record.receipt(event.receipt)
            request.on_event(event)

        return replace(request, on_event=on_event, priority=max(request.priority, rules.max_priority))

    def admitted(self, request: Request) -> None:
        self._began = True
        if self.tenant.bucket is not None:
            self.tenant.bucket.charge(len(request.tokens))
        self.record.request(request)

    def compute(self, tokens: int) -> None:
        """Charges work at the engine's exclusive door. Raises QuotaExceeded."""
        self._check_tokens()
        self._began = True
        if self.tenant.bucket is not None:
            self.tenant.bucket.charge(tokens)

    def _check_tokens(self) -> None:
        """A call that has begun is not stopped in its middle; the tokens that it takes beyond its quota are owed."""
        bucket, rate = self.tenant.bucket, self.tenant.rules.tokens_per_minute
        if bucket is not None and not self._began and (wait := bucket.seconds_until_ready()) > 0:
            message = f"tenant {self.tenant.name!r} has used its {rate} tokens a minute"
            raise QuotaExceeded("", message).after(wait)

    def set_strength(self, edit: str, strength: float) -> None:
        check_strength(strength, self.tenant.rules.edits, "set_strength.strength")
        self.record.strength(edit, strength)

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        use = self.tenant.rules.artifacts.use
        return artifact_id in self._allowed or matches(use, artifact_id) or any(matches(use, tag) for tag in tags)

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None:
        use = self.tenant.rules.artifacts.use
        if artifact_id not in self._allowed and not matches(use, ref) and not self.sees(artifact_id, tags()):
            raise PermissionDenied("ref", f"tenant {self.tenant.name!r} may not use the artifact {ref}")
        self._allowed.add(artifact_id)
        self.record.artifact(artifact_id)

    def put(self, tags: Iterable[str]) -> None:
        if not self.tenant.rules.artifacts.upload:
            raise PermissionDenied("", f"tenant {self.tenant.name!r} may not store artifacts")
        for i, tag in enumerate(tags):
            self._check_tag(tag, f"tags[{i}]")

    def tag(self, tag: str) -> None:
        self._check_tag(tag, "tag")

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None:
        delete, names = self.tenant.rules.artifacts.delete, list(tags)
        if not matches(delete, artifact_id) and not (names and all(matches(delete, name) for name in names)):
            raise PermissionDenied("ref", f"tenant {self.tenant.name!r} may not delete the artifact {artifact_id}")

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None:
        self._allowed.add(artifact_id)
        self.record.change(action, artifact_id, tags)

    def _check_tag(self, tag: str, path: str) -> None:
        if not matches(self.tenant.rules.artifacts.tag, tag):
            raise PermissionDenied(path, f"tenant {self.tenant.name!r} may not set or remove the tag {tag!r}")


ACCESS: ContextVar[Access | None] = ContextVar("access", default=None)


class CallersAccess:
    """The EngineAccess and ArtifactAccess of whichever call asks. What the server does on its own is not limited."""

    def admit(self, request: Request) -> Request:
        access = ACCESS.get()
        return request if access is None else access.admit(request)

    def admitted(self, request: Request) -> None:
        if access := ACCESS.get():
            access.admitted(request)

    def compute(self, tokens: int) -> None:
        if access := ACCESS.get():
            access.compute(tokens)

    def set_strength(self, edit: str, strength: float) -> None:
        if access := ACCESS.get():
            access.set_strength(edit, strength)

    def sees(self, artifact_id: str, tags: Iterable[str]) -> bool:
        access = ACCESS.get()
        return access is None or access.sees(artifact_id, tags)

    def use(self, artifact_id: str, ref: str, tags: Tags) -> None:
        if access := ACCESS.get():
            access.use(artifact_id, ref, tags)

    def put(self, tags: Iterable[str]) -> None:
        if access := ACCESS.get():
            access.put(tags)

    def tag(self, tag: str) -> None:
        if access := ACCESS.get():
            access.tag(tag)

    def delete(self, artifact_id: str, tags: Iterable[str]) -> None:
        if access := ACCESS.get():
            access.delete(artifact_id, tags)

    def changed(self, action: str, artifact_id: str, tags: Iterable[str]) -> None:
        if access := ACCESS.get():
            access.changed(action, artifact_id, tags)


def check_edits(edits: tuple[Edit, ...], rules: EditRules) -> None:
    """Raises PermissionDenied with the path of the edit that the rules do not allow."""
    if rules.max_edits is not None and len(edits) > rules.max_edits:
        message = f"{len(edits)} edits; the policy allows {rules.max_edits}"
        raise PermissionDenied("program.edits", message)
    for i, edit in enumerate(edits):
        path, kind = f"program.edits[{i}]", kind_name(edit.kind)
        if kind not in rules.kinds:
            allowed = ", ".join(rules.kinds) or "none"
            raise PermissionDenied(f"{path}.{kind}", f"edits by {kind} are not allowed; allowed: {allowed}")
        check_strength(edit.strength, rules, f"{path}.strength")
        if not rules.inline_vectors and (field := inline_numbers(edit)):
            raise PermissionDenied(f"{path}.{field}", "the policy allows vectors of artifacts only")


def check_strength(strength: float, rules: EditRules, path: str) -> None:
    if rules.max_strength is not None and abs(strength) > rules.max_strength:
        raise PermissionDenied(path, f"|{strength:g}| is above {rules.max_strength:g}, which the policy allows")
