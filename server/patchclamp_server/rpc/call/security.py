"""The security of one call: who makes it, whether it may, what it did. The interceptor puts every call through it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, Protocol, TypeAlias

from patchclamp_server.callers import CALLER, Caller
from patchclamp_server.errors import PermissionDenied, Unauthenticated
from patchclamp_server.rpc.call.identity import Identity, identify
from patchclamp_server.security.access import ACCESS, Access
from patchclamp_server.security.policy import TenantRules, matches
from patchclamp_server.security.record import CallRecord
from patchclamp_server.security.running_call import RunningCall
from patchclamp_server.security.security import Security
from patchclamp_server.security.tenants import killed

Context = Any

# Probes have no token.
OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
# These calls take no place of `max_concurrent`: the job takes one, and whoever may have only one can still ask how it
# goes and cancel it. The kill switch ends the job, and so those who follow it.
PLACELESS_SERVICES = frozenset({"patchclamp.v1.JobService"})
# These calls are in the audit log whatever their requests ran, because they change what is watched, or run edits and
# sparse policies of their own. The log records AUDITED_FIELDS of them.
AUDITED_METHODS = frozenset(
    {
        "MonitoringService/StartWatch",
        "MonitoringService/StopWatch",
        "MonitoringService/RecordReference",
        "SparsityService/CalibrateProfile",
        "SparsityService/EvaluateProfile",
        "SparsityService/PredictCoreNeurons",
        "HeadService/EvaluateHeadEdit",
        "HeadService/FindCircuit",
        "NeuronService/EvaluateNeuronEdit",
        "SteeringService/CalibrateVector",
        "NeuronService/DescribeNeurons",
        "ActivationService/PatchActivations",
    }
)
AUDITED_FIELDS = ("name", "watch", "method", "mode")


Received: TypeAlias = Callable[[Any], Any]


class Ending(Protocol):
    """The interceptor implements this: it calls back with the name of the status code when the call has one."""

    def then(self, callback: Callable[[str], None]) -> None: ...


class CallSecurity:
    """`text_of` decodes token ids, for prompts in the audit log."""

    def __init__(self, security: Security, model: str, text_of: Callable[[tuple[int, ...]], str]) -> None:
        self._security = security
        self._model = model
        self._text_of = text_of if security.audit_prompts else None

    @asynccontextmanager
    async def call(self, service: str, name: str, context: Context, ending: Ending) -> AsyncIterator[Received]:
        """Yields a function for the request, once it is decoded: nothing is decoded for whoever may not call.

        It waits for a place among the calls of the tenant. Raises Unauthenticated, PermissionDenied or QuotaExceeded;
        PermissionDenied also out of the block, when the kill switch ends it.
        """
        if service in OPEN_SERVICES or not self._security.is_configured:
            yield unchanged
            return
        identity = self._identify(context)
        tenants, metrics = self._security.tenants, self._security.metrics
        label = tenants.label(identity.tenant)
        ending.then(lambda code: metrics.tenant_requests.labels(label, code).inc())
        tenant = tenants.get(identity.tenant)
        method = f"{service.rpartition('.')[2]}/{name}"
        self._check(identity.tenant, tenant.rules, method)
        record = CallRecord(self._text_of)
        access = Access(tenant, record)
        arguments: dict[str, str | int] = {}

        def received(request: Any) -> Any:
            # A job that could not store what it finds is refused before it begins.
            if "tags" in getattr(request, "DESCRIPTOR", _NO_MESSAGE).fields_by_name:
                access.put(request.tags)
            if method in AUDITED_METHODS:
                arguments.update(_arguments(request))
            return request

        ending.then(lambda code: self._audit(identity, context, method, arguments, record, code))
        # These are not reset, because the context is that of the call's own task, and ends with it.
        CALLER.set(Caller(identity.tenant, tenant.rules.weight))
        ACCESS.set(access)
        running = RunningCall()
        is_placeless = service in PLACELESS_SERVICES
        with running.ending_with(killed()), tenant.beside() if is_placeless else nullcontext():
            async with nullcontext() if is_placeless else tenant.call(running):
                yield received

    def _identify(self, context: Context) -> Identity:
        try:
            return identify(context, self._security)
        except Unauthenticated as error:
            self._security.metrics.auth_failures.labels(error.reason).inc()
            raise

    def _check(self, tenant: str, rules: TenantRules, method: str) -> None:
        if not matches(rules.methods, method):
            raise PermissionDenied("", f"tenant {tenant!r} may not call {method}", "METHOD_NOT_ALLOWED")
        if not matches(rules.models, self._model):
            raise PermissionDenied("model", f"tenant {tenant!r} may not use {self._model!r}", "MODEL_NOT_ALLOWED")

    def _audit(
        self,
        identity: Identity,
        context: Context,
        method: str,
        arguments: dict[str, str | int],
        record: CallRecord,
        code: str,
    ) -> None:
        if self._security.audit is None or not (record.is_of_note or method in AUDITED_METHODS):
            return
        self._security.audit.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "tenant": identity.tenant,
                "token": identity.token,
                "certificate": identity.certificate,
                "peer": context.peer(),
                "method": method,
                "arguments": arguments,
                "code": code,
                **record.to_dict(),
            }
        )


def unchanged(request: Any) -> Any:
    return request


def _arguments(request: Any) -> dict[str, str | int]:
    given = {name: getattr(request, name, None) for name in AUDITED_FIELDS}
    return {name: value for name, value in given.items() if isinstance(value, str | int)}


class _NoMessage:
    """Stands for the descriptor of a stream of requests."""

    fields_by_name: tuple[str, ...] = ()


_NO_MESSAGE = _NoMessage()
