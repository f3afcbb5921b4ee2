"""Turns sparsity messages into bound policies and the engine's words, and what sparse inference did into messages.

A field that a policy message leaves empty is that of the profile, or the default where there is no profile.
"""

from contextlib import AbstractContextManager
from typing import Any

from patchclamp.v1 import sparse_policy_pb2 as pb
from patchclamp_server.engine.request import QualityGuard, SparseInference, SparsityReport
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, fields_as
from patchclamp_server.interventions.field_checks import chosen, count, finite, known
from patchclamp_server.sparsity.binder import Binder, Bound, StoredNeurons, StoredProfile
from patchclamp_server.sparsity.parameters import parameters_of, policy_with
from patchclamp_server.sparsity.policies import CONTROLS
from patchclamp_server.sparsity.policies.fovea import BITS
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policy import Policy

# These policies have another name than their field of SparsePolicy.
NAMES = {"random_set": "random"}
FIELDS = {NAMES.get(f.name, f.name): f.name for f in pb.SparsePolicy.DESCRIPTOR.oneofs_by_name["policy"].fields}

RANKINGS: dict[int, str] = {
    pb.CORE_INFER_RANKING_MAGNITUDE: "magnitude",
    pb.CORE_INFER_RANKING_VALUE: "value",
}
ALLOCATIONS: dict[int, str] = {
    pb.TEAL_ALLOCATION_UNIFORM: "uniform",
    pb.TEAL_ALLOCATION_GREEDY: "greedy",
}
# These parameters of policies have another name in their message.
PARAMETER_FIELDS = {"gate": "exact_gate", "compensate": "without_compensation", "budget": "uniform_budget"}

DEFAULT_GUARD = QualityGuard(max_divergence=0.0)
# The default guard lets the divergence be this many times that on the card.
GUARD_FACTOR = 2.0
MAX_WINDOW = 4096


def decode_sparsity(
    proto: pb.Sparsity, binder: Binder, field: str = "sparsity", *, guarded: bool = True
) -> SparseInference:
    """Returns the sparse inference of a request that is served; a guard is refused unless `guarded`. Loads artifacts
    and may read all weights: call it in a thread. Raises InvalidArgument, FailedPrecondition and NotFound, with paths
    below `field`."""
    bound, stored = _decode(proto, binder, field, controls=False)
    guard = None
    if proto.HasField("guard"):
        if not guarded:
            raise InvalidArgument(f"{field}.guard", "a guard watches generation; here is none")
        guard = _guard(proto.guard, bound, stored, f"{field}.guard")
    return SparseInference(bound.policy.name, bound.selector, bound.profile, guard)


def decode_unguarded(proto: pb.Sparsity, binder: Binder, field: str) -> Bound:
    """Returns the policy of an analysis, which accepts controls and no guards. Otherwise it does what decode_sparsity
    does."""
    if proto.HasField("guard"):
        raise InvalidArgument(f"{field}.guard", "a guard watches generation; here is none")
    return _decode(proto, binder, field, controls=True)[0]


def decode_policy(proto: pb.SparsePolicy, field: str) -> Policy:
    """Returns a policy without a profile, not yet bound. Raises InvalidArgument with paths below `field`."""
    oneof = chosen(proto, "policy", field)
    parameters = _parameters(proto, oneof, field)
    with _paths(field, oneof):
        return policy_with(NAMES.get(oneof, oneof), parameters)


def policy_path(policy: Policy, field: str) -> str:
    """Returns the path of the message of a policy's own in the SparsePolicy at `field`."""
    return f"{field}.{FIELDS[policy.name]}"


def policy_paths(policy: Policy, field: str) -> AbstractContextManager[None]:
    """Makes errors raised inside speak of the SparsePolicy at `field`."""
    return _paths(field, FIELDS[policy.name])


def encode_report(report: SparsityReport) -> pb.SparsityReport:
    message = pb.SparsityReport(
        policy=report.policy,
        profile=report.profile,
        sparse_tokens=report.sparse_tokens,
        dense_tokens=report.dense_tokens,
        active_ratio=report.active_ratio,
        filled_ratio=report.filled_ratio,
    )
    if (guard := report.guard) is not None:
        message.guard.CopyFrom(
            pb.GuardReport(
                sampled_tokens=guard.sampled_tokens,
                mean_divergence=guard.mean_divergence,
                top1_agreement=guard.top1_agreement,
                max_divergence=guard.max_divergence,
                dense_from=guard.dense_from,
            )
        )
    return message


def _decode(proto: pb.Sparsity, binder: Binder, field: str, *, controls: bool) -> tuple[Bound, StoredProfile | None]:
    path, profile_path = f"{field}.policy", f"{field}.profile"
    if not proto.profile and not proto.HasField("policy"):
        raise InvalidArgument(field, "expected a profile, a policy or both")
    stored = binder.profile(proto.profile, profile_path) if proto.profile else None
    oneof = _oneof(proto.policy, stored, field)
    name = NAMES.get(oneof, oneof)
    if name in CONTROLS and not controls:
        raise InvalidArgument(f"{path}.{oneof}", "a control of evaluations; requests are not served with it")
    parameters = _parameters(proto.policy, oneof, path)
    if stored is not None:
        parameters = {**parameters_of(stored.policy), **parameters}
    with _paths(path, oneof):
        policy = policy_with(name, parameters)
    source: StoredProfile | StoredNeurons | None = stored
    if isinstance(policy, StaticSet):
        neurons_path, ref = f"{path}.static_set.neuron_set", proto.policy.static_set.neuron_set
        if bool(ref) == (stored is not None):
            raise InvalidArgument(neurons_path, "expected a neuron set or a profile, and not both")
        source = stored or binder.neuron_set(ref, neurons_path)
    elif policy.needs_profile and stored is None:
        raise InvalidArgument(profile_path, f"{name} needs a profile: calibrate one with CalibrateProfile")
    with _paths(path, oneof, profile_path):
        return binder.bind(policy, source), stored


def _oneof(policy: pb.SparsePolicy, stored: StoredProfile | None, field: str) -> str:
    """Returns the policy that is asked for, by its field in SparsePolicy."""
    if stored is None:
        return chosen(policy, "policy", f"{field}.policy")
    own = FIELDS[stored.policy.name]
    asked = policy.WhichOneof("policy") or own
    if asked != own:
        raise FailedPrecondition(f"{field}.profile", f"is a profile of {own}; the request asks for {asked}")
    return own


def _parameters(proto: pb.SparsePolicy, oneof: str, field: str) -> dict[str, Any]:
    """Returns the parameters that the message gives, by their names in the policy."""
    given: dict[str, Any] = {}
    if proto.HasField("keep_ratio"):
        given["keep_ratio"] = finite(proto.keep_ratio, f"{field}.keep_ratio", low=0.0, high=1.0)
    if proto.layer_keep_ratios:
        if "keep_ratio" in given:
            raise InvalidArgument(f"{field}.layer_keep_ratios", "give keep_ratio or layer_keep_ratios, not both")
        given["keep_ratio"] = tuple(
            finite(ratio, f"{field}.layer_keep_ratios[{i}]", low=0.0, high=1.0)
            for i, ratio in enumerate(proto.layer_keep_ratios)
        )
    if oneof == "dense":
        # Everything is computed, whatever the ratio.
        given.pop("keep_ratio", None)
    if proto.first_layer:
        given["first_layer"] = count(proto.first_layer, f"{field}.first_layer")
    if proto.HasField("end_layer"):
        given["end_layer"] = count(proto.end_layer, f"{field}.end_layer")
    own = f"{field}.{oneof}"
    match oneof:
        case "coreinfer_stability" | "coreinfer_similarity":
            core: pb.CoreInferPolicy = getattr(proto, oneof)
            if core.HasField("token_keep"):
                given["token_keep"] = finite(core.token_keep, f"{own}.token_keep", low=0.0, high=1.0)
            if core.rank_by:
                names = pb.CoreInferRanking.keys()[1:]
                given["rank_by"] = known(core.rank_by, RANKINGS, f"{own}.rank_by", names)
        case "teal":
            if proto.teal.allocation:
                names = pb.TealAllocation.keys()[1:]
                given["allocation"] = known(proto.teal.allocation, ALLOCATIONS, f"{own}.allocation", names)
        case "fovea":
            given |= _fovea(proto.fovea, own)
        case "random_set":
            given["seed"] = proto.random_set.seed
    return given


def _fovea(proto: pb.FoveaPolicy, field: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if proto.HasField("bits"):
        if proto.bits not in BITS:
            raise InvalidArgument(f"{field}.bits", f"expected one of {', '.join(map(str, BITS))}, got {proto.bits}")
        given["bits"] = proto.bits
    if proto.exact_gate:
        given["gate"] = "exact"
    if proto.without_compensation:
        given["compensate"] = False
    if proto.uniform_budget:
        given["budget"] = "uniform"
    return given


def _guard(proto: pb.QualityGuard, bound: Bound, stored: StoredProfile | None, field: str) -> QualityGuard:
    rate = proto.sample_rate if proto.HasField("sample_rate") else DEFAULT_GUARD.sample_rate
    if not 0.0 < rate <= 1.0:
        raise InvalidArgument(f"{field}.sample_rate", f"expected a number above 0 and at most 1, got {rate:g}")
    window = proto.window if proto.HasField("window") else DEFAULT_GUARD.window
    count(window, f"{field}.window", low=1, high=MAX_WINDOW)
    if not proto.HasField("max_divergence"):
        return QualityGuard(_allowed_divergence(bound, stored, f"{field}.max_divergence"), rate, window)
    if finite(proto.max_divergence, f"{field}.max_divergence") <= 0.0:
        raise InvalidArgument(f"{field}.max_divergence", f"expected a number above 0, got {proto.max_divergence:g}")
    return QualityGuard(proto.max_divergence, rate, window)


def _allowed_divergence(bound: Bound, stored: StoredProfile | None, field: str) -> float:
    """Returns GUARD_FACTOR times the divergence on the card of the profile. Raises InvalidArgument where the card does
    not speak of what the request asks for."""
    if stored is None:
        raise InvalidArgument(field, "required: without a profile there is no quality card to take it from")
    if bound.policy != stored.policy:
        message = "required: the quality card of the profile was measured with other parameters than those asked for"
        raise InvalidArgument(field, message)
    if stored.divergence is None or not stored.divergence > 0.0:
        raise InvalidArgument(field, "required: the quality card of the profile has no divergence above 0")
    return GUARD_FACTOR * stored.divergence


def _paths(field: str, oneof: str, profile: str = "") -> AbstractContextManager[None]:
    """Gives errors of policies, which name a parameter as "sparsity.<parameter>", its path in the SparsePolicy."""

    def path(parameter: str) -> str:
        name = parameter.removeprefix("sparsity.").partition("[")[0]
        match name:
            case "profile":
                return profile
            case "neurons":
                return f"{field}.static_set.neuron_set"
            case "keep_ratio" | "layer_keep_ratios" | "first_layer" | "end_layer":
                return f"{field}.{name}"
            case _:
                return f"{field}.{oneof}.{PARAMETER_FIELDS.get(name, name)}"

    return fields_as(path)
