"""Sparsity messages → bound policies: defaults, profiles, guards, and what is refused at which path."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_models import profile, sparse_model

from patchclamp.v1 import sparse_policy_pb2 as pb
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.request import GuardReport, QualityGuard, SparseInference, SparsityReport
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound, RequestError
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.sparsity import decode_sparsity, decode_unguarded, encode_report
from patchclamp_server.sparsity.binder import MAX_SELECTORS, Binder
from patchclamp_server.sparsity.parameters import parameters_of
from patchclamp_server.sparsity.policies import CONTROLS, POLICIES
from patchclamp_server.sparsity.policies.cats import Cats
from patchclamp_server.sparsity.policies.coreinfer_stability import CoreInferStability
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import Policy

MODEL = sparse_model()
# What the profiles of the store were calibrated as.
CALIBRATED: dict[str, Policy] = {
    "fovea": Fovea(keep_ratio=0.4, budget="uniform", first_layer=1),
    "teal": Teal(allocation="greedy", keep_ratio=0.6),
    "cats": Cats(),
    "static_set": POLICIES["static_set"](),
    "coreinfer_similarity": POLICIES["coreinfer_similarity"](token_keep=0.3, rank_by="value"),
}


def put_profile(store: ArtifactStore, name: str, **changes: Any) -> str:
    made = profile(name)
    assert made is not None
    fields: dict[str, Any] = {
        "tensors": made.tensors,
        "model_fingerprint": MODEL.fingerprint,
        "provenance": {"policy": name, "parameters": parameters_of(CALIBRATED[name])},
        "evidence": {"quality": {"divergence": 0.03}},
        "tags": [name],
    }
    return store.put(ArtifactKind.SPARSITY_PROFILE, **{**fields, **changes}).id


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    store = ArtifactStore(tmp_path_factory.mktemp("sparsity"))
    for name in CALIBRATED:
        put_profile(store, name)
    put_profile(store, "cats", model_fingerprint="another-model", tags=["foreign"])
    # Artifacts are what somebody uploaded: nothing in them can be trusted.
    parameters = parameters_of(CALIBRATED["fovea"])
    for tag, wrong in {
        "five-bits": {**parameters, "bits": 5},
        "no-such-parameter": {**parameters, "colour": 3},
        "a-text": {**parameters, "first_layer": "one"},
        "two-ratios": {**parameters, "keep_ratio": [0.5, 0.5]},
        "a-truth": {**parameters, "bits": True},
    }.items():
        put_profile(store, "fovea", provenance={"policy": "fovea", "parameters": wrong}, tags=[tag])
    put_profile(store, "cats", provenance={"policy": "cats", "parameters": [1]}, tags=["a-list"])
    put_profile(store, "cats", provenance={"policy": "griffin"}, tags=["griffin-profile"])
    put_profile(store, "cats", provenance={"policy": "newest"}, tags=["newest"])
    put_profile(store, "cats", tensors={"quantiles": torch.ones(3, 7)}, tags=["short"])
    put_profile(store, "cats", tensors={"other": torch.ones(3)}, tags=["without-quantiles"])
    put_profile(store, "cats", evidence={}, tags=["without-card"])
    put_profile(store, "cats", evidence={"quality": {"divergence": 0}}, tags=["no-divergence"])
    put_profile(store, "cats", evidence={"quality": {"divergence": "small"}}, tags=["a-small-divergence"])
    store.put(
        ArtifactKind.VECTOR,
        {"layer.0": torch.ones(48)},
        model_fingerprint=MODEL.fingerprint,
        site=Site.RESID_POST,
        tags=["vector"],
    )
    neurons = {"layer.0.neurons": torch.tensor([5, 3]), "layer.2.neurons": torch.tensor([0])}
    store.put(ArtifactKind.NEURON_SET, neurons, model_fingerprint=MODEL.fingerprint, tags=["neurons"])
    store.put(ArtifactKind.NEURON_SET, neurons, model_fingerprint="another-model", tags=["foreign-neurons"])
    beyond = {"layer.1.neurons": torch.tensor([80])}
    store.put(ArtifactKind.NEURON_SET, beyond, model_fingerprint=MODEL.fingerprint, tags=["beyond"])
    return store


@pytest.fixture
def binder(store: ArtifactStore) -> Binder:
    return Binder(MODEL, store)


def policy(**fields: Any) -> pb.SparsePolicy:
    return pb.SparsePolicy(**fields)


def griffin(**fields: Any) -> pb.Sparsity:
    return pb.Sparsity(policy=policy(griffin=pb.GriffinPolicy(), **fields))


def test_a_policy_without_parameters_keeps_half(binder: Binder) -> None:
    found = decode_sparsity(griffin(), binder)
    assert (found.policy, found.profile, found.guard) == ("griffin", "", None)
    assert found.selector.keep == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - CONTROLS - {"static_set"}))
def test_every_policy_that_is_served_has_a_message(binder: Binder, name: str) -> None:
    message = policy()
    getattr(message, name).SetInParent()
    asked = pb.Sparsity(policy=message, profile=name if name in CALIBRATIONS else "")
    assert decode_sparsity(asked, binder).policy == name


def test_common_parameters_are_those_of_the_message(binder: Binder) -> None:
    layers = decode_sparsity(griffin(layer_keep_ratios=[0.2, 1.0, 0.0]), binder)
    assert layers.selector.keep == (0.2, 1.0, 0.0)
    some = decode_sparsity(griffin(keep_ratio=0.0, first_layer=1, end_layer=2), binder)
    assert some.selector.keep == (1.0, 0.0, 1.0)


def test_parameters_of_a_policy_are_those_of_its_message(binder: Binder) -> None:
    core = pb.CoreInferPolicy(token_keep=0.1, rank_by=pb.CORE_INFER_RANKING_VALUE)
    bound = decode_unguarded(pb.Sparsity(policy=policy(coreinfer_stability=core)), binder, "s")
    assert bound.policy == CoreInferStability(token_keep=0.1, rank_by="value")
    fovea = pb.FoveaPolicy(bits=3, exact_gate=True, without_compensation=True, uniform_budget=True)
    bound = decode_unguarded(pb.Sparsity(profile="fovea", policy=policy(fovea=fovea, keep_ratio=0.3)), binder, "s")
    assert bound.policy == Fovea(
        bits=3, gate="exact", compensate=False, budget="uniform", keep_ratio=0.3, first_layer=1
    )


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_profile_alone_says_the_policy_and_its_parameters(binder: Binder, store: ArtifactStore, name: str) -> None:
    found = decode_sparsity(pb.Sparsity(profile=name), binder)
    assert (found.policy, found.profile) == (name, store.resolve(name))
    assert found.selector.keep == CALIBRATED[name].keep_by_layer(3)
    assert found.selector.profile is not None
    assert decode_unguarded(pb.Sparsity(profile=name), binder, "s").policy == CALIBRATED[name]


def test_parameters_of_the_request_win_over_those_of_the_profile(binder: Binder) -> None:
    uniform = pb.TealPolicy(allocation=pb.TEAL_ALLOCATION_UNIFORM)
    asked = pb.Sparsity(profile="teal", policy=policy(teal=uniform))
    assert decode_unguarded(asked, binder, "s").policy == Teal(allocation="uniform", keep_ratio=0.6)
    ratio_alone = pb.Sparsity(profile="teal", policy=policy(keep_ratio=0.25))
    assert decode_unguarded(ratio_alone, binder, "s").policy == Teal(allocation="greedy", keep_ratio=0.25)


def test_a_static_set_takes_its_neurons_from_an_artifact(binder: Binder) -> None:
    asked = pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy(neuron_set="neurons")))
    found = decode_sparsity(asked, binder)
    state = found.selector.begin()
    sets = [found.selector.fixed_set(state, layer) for layer in range(3)]
    assert [None if s is None else s.nonzero()[:, 0].tolist() for s in sets] == [[3, 5], None, [0]]
    assert [found.selector.is_dense(layer) for layer in range(3)] == [False, True, False]
    assert found.profile == ""


def test_controls_serve_analyses_and_no_request(binder: Binder) -> None:
    random = pb.Sparsity(policy=policy(random_set=pb.RandomSetPolicy(seed=2**64 - 1)))
    oracle = pb.Sparsity(policy=policy(oracle=pb.OraclePolicy()))
    assert [decode_unguarded(s, binder, "s").policy.name for s in (random, oracle)] == ["random", "oracle"]
    for asked, path in ((random, "sparsity.policy.random_set"), (oracle, "sparsity.policy.oracle")):
        with pytest.raises(InvalidArgument) as refusal:
            decode_sparsity(asked, binder)
        assert refusal.value.field == path


def test_requests_that_ask_for_the_same_share_one_selector(binder: Binder, store: ArtifactStore) -> None:
    first = decode_sparsity(pb.Sparsity(profile="fovea"), binder).selector
    assert decode_sparsity(pb.Sparsity(profile=store.resolve("fovea")), binder).selector is first
    spelled_out = policy(fovea=pb.FoveaPolicy(bits=3, uniform_budget=True), keep_ratio=0.4, first_layer=1)
    assert decode_sparsity(pb.Sparsity(profile="fovea", policy=spelled_out), binder).selector is first
    assert decode_sparsity(pb.Sparsity(profile="fovea", policy=policy(keep_ratio=0.3)), binder).selector is not first
    assert decode_sparsity(griffin(), binder).selector is decode_sparsity(griffin(keep_ratio=0.5), binder).selector


def test_selectors_are_kept_up_to_a_bound_and_the_least_recently_used_goes_first(binder: Binder) -> None:
    first, second = (decode_sparsity(griffin(keep_ratio=k), binder).selector for k in (0.0, 1.0))
    for i in range(MAX_SELECTORS - 1):
        assert decode_sparsity(griffin(keep_ratio=0.0), binder).selector is first
        decode_sparsity(griffin(keep_ratio=(i + 1) / 1000), binder)
    assert decode_sparsity(griffin(keep_ratio=0.0), binder).selector is first
    assert decode_sparsity(griffin(keep_ratio=1.0), binder).selector is not second


def test_a_bound_selector_has_made_what_it_derives_from_the_weights(store: ArtifactStore) -> None:
    model = replace(MODEL, derived={})
    decode_sparsity(pb.Sparsity(profile="fovea"), Binder(model, store))
    assert "sketches.3" in model.derived


def guarded(profile: str = "fovea", policy: pb.SparsePolicy | None = None, **guard: Any) -> pb.Sparsity:
    return pb.Sparsity(profile=profile, policy=policy, guard=pb.QualityGuard(**guard))


def test_a_guard_allows_twice_the_divergence_on_the_card_unless_it_says_otherwise(binder: Binder) -> None:
    assert decode_sparsity(guarded(), binder).guard == QualityGuard(0.06, 1 / 16, 8)
    whole = guarded(max_divergence=0.5, sample_rate=1.0, window=1)
    assert decode_sparsity(whole, binder).guard == QualityGuard(0.5, 1.0, 1)
    alone = pb.Sparsity(policy=policy(wina=pb.WinaPolicy()), guard=pb.QualityGuard(max_divergence=0.1))
    assert decode_sparsity(alone, binder).guard == QualityGuard(0.1)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(guarded(policy=policy(keep_ratio=0.3)), id="another ratio"),
        pytest.param(guarded(policy=policy(fovea=pb.FoveaPolicy(without_compensation=True))), id="other parameters"),
        pytest.param(guarded("without-card"), id="no card"),
        pytest.param(guarded("no-divergence"), id="a card of a dense policy"),
        pytest.param(guarded("a-small-divergence"), id="a card of words"),
        pytest.param(guarded("", policy(griffin=pb.GriffinPolicy())), id="no profile"),
        pytest.param(guarded(max_divergence=0.0), id="zero"),
        pytest.param(guarded(max_divergence=-1.0), id="negative"),
        pytest.param(guarded(max_divergence=float("nan")), id="NaN"),
        pytest.param(guarded(max_divergence=float("inf")), id="Inf"),
    ],
)
def test_a_guard_that_has_no_bound_is_refused(binder: Binder, asked: pb.Sparsity) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        decode_sparsity(asked, binder)
    assert refusal.value.field == "sparsity.guard.max_divergence"


@pytest.mark.parametrize(
    ("guard", "field"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.01}, "sample_rate"),
        ({"sample_rate": float("nan")}, "sample_rate"),
        ({"window": 0}, "window"),
        ({"window": 2**32 - 1}, "window"),
    ],
)
def test_a_guard_that_cannot_sample_is_refused(binder: Binder, guard: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        decode_sparsity(guarded(max_divergence=1.0, **guard), binder)
    assert refusal.value.field == f"sparsity.guard.{field}"


@pytest.mark.parametrize(
    "decode", [decode_unguarded, lambda *args: decode_sparsity(*args, guarded=False)], ids=["analysis", "score"]
)
def test_a_guard_is_refused_where_nothing_is_generated(
    binder: Binder, decode: Callable[[pb.Sparsity, Binder, str], object]
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        decode(guarded(max_divergence=1.0), binder, "sparsities[2]")
    assert refusal.value.field == "sparsities[2].guard"


@pytest.mark.parametrize(
    ("asked", "error", "field"),
    [
        (pb.Sparsity(), InvalidArgument, ""),
        (pb.Sparsity(policy=policy(keep_ratio=0.5)), InvalidArgument, ".policy.policy"),
        (griffin(keep_ratio=1.5), InvalidArgument, ".policy.keep_ratio"),
        (griffin(keep_ratio=float("nan")), InvalidArgument, ".policy.keep_ratio"),
        (griffin(layer_keep_ratios=[0.5, 0.5]), InvalidArgument, ".policy.layer_keep_ratios"),
        (griffin(layer_keep_ratios=[0.5, -0.5, 0.5]), InvalidArgument, ".policy.layer_keep_ratios[1]"),
        (griffin(layer_keep_ratios=[0.5] * 3, keep_ratio=0.5), InvalidArgument, ".policy.layer_keep_ratios"),
        (griffin(end_layer=4), InvalidArgument, ".policy.end_layer"),
        (griffin(first_layer=2, end_layer=1), InvalidArgument, ".policy.end_layer"),
        (griffin(first_layer=2**32 - 1), InvalidArgument, ".policy.first_layer"),
        (
            pb.Sparsity(policy=policy(coreinfer_stability=pb.CoreInferPolicy(token_keep=2.0))),
            InvalidArgument,
            ".policy.coreinfer_stability.token_keep",
        ),
        (
            pb.Sparsity(policy=policy(coreinfer_stability=pb.CoreInferPolicy(rank_by=9))),  # type: ignore[arg-type]
            InvalidArgument,
            ".policy.coreinfer_stability.rank_by",
        ),
        (
            pb.Sparsity(profile="teal", policy=policy(teal=pb.TealPolicy(allocation=9))),  # type: ignore[arg-type]
            InvalidArgument,
            ".policy.teal.allocation",
        ),
        (
            pb.Sparsity(profile="fovea", policy=policy(fovea=pb.FoveaPolicy(bits=5))),
            InvalidArgument,
            ".policy.fovea.bits",
        ),
        (pb.Sparsity(policy=policy(fovea=pb.FoveaPolicy())), InvalidArgument, ".profile"),
        (pb.Sparsity(policy=policy(teal=pb.TealPolicy())), InvalidArgument, ".profile"),
        (pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy())), InvalidArgument, ".policy.static_set.neuron_set"),
        (
            pb.Sparsity(profile="static_set", policy=policy(static_set=pb.StaticSetPolicy(neuron_set="neurons"))),
            InvalidArgument,
            ".policy.static_set.neuron_set",
        ),
        (
            pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy(neuron_set="unknown"))),
            NotFound,
            ".policy.static_set.neuron_set",
        ),
        (
            pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy(neuron_set="vector"))),
            FailedPrecondition,
            ".policy.static_set.neuron_set",
        ),
        (
            pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy(neuron_set="foreign-neurons"))),
            FailedPrecondition,
            ".policy.static_set.neuron_set",
        ),
        (
            pb.Sparsity(policy=policy(static_set=pb.StaticSetPolicy(neuron_set="beyond"))),
            InvalidArgument,
            ".policy.static_set.neuron_set",
        ),
        (pb.Sparsity(profile="unknown"), NotFound, ".profile"),
        (pb.Sparsity(profile="sha256:" + "0" * 64), NotFound, ".profile"),
        (pb.Sparsity(profile="../etc"), InvalidArgument, ".profile"),
        (pb.Sparsity(profile="foreign"), FailedPrecondition, ".profile"),
        (pb.Sparsity(profile="vector"), FailedPrecondition, ".profile"),
        (pb.Sparsity(profile="teal", policy=policy(fovea=pb.FoveaPolicy())), FailedPrecondition, ".profile"),
        (pb.Sparsity(profile="teal", policy=policy(griffin=pb.GriffinPolicy())), FailedPrecondition, ".profile"),
        # Calibrated for sketches of 3 bits.
        (
            pb.Sparsity(profile="fovea", policy=policy(fovea=pb.FoveaPolicy(bits=4))),
            FailedPrecondition,
            ".profile",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_at_its_path(
    binder: Binder, asked: pb.Sparsity, error: type[RequestError], field: str
) -> None:
    with pytest.raises(error) as refusal:
        decode_sparsity(asked, binder)
    assert refusal.value.field == f"sparsity{field}"


@pytest.mark.parametrize(
    "tag",
    [
        "five-bits",
        "no-such-parameter",
        "a-text",
        "two-ratios",
        "a-truth",
        "a-list",
        "griffin-profile",
        "newest",
        "short",
        "without-quantiles",
    ],
)
def test_a_profile_that_its_policy_cannot_use_is_a_failed_precondition(binder: Binder, tag: str) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        decode_sparsity(pb.Sparsity(profile=tag), binder)
    assert refusal.value.field == "sparsity.profile"


def test_a_report_is_told_with_and_without_a_guard() -> None:
    plain = encode_report(SparsityReport("cats", "", 7, 0, 0.25))
    assert (plain.policy, plain.profile, plain.sparse_tokens, plain.active_ratio) == ("cats", "", 7, 0.25)
    assert not plain.HasField("guard")
    guard = GuardReport(4, 0.5, 0.75, 0.25, dense_from=19)
    told = encode_report(SparsityReport("fovea", "sha256:1", 5, 2, 0.5, guard)).guard
    assert (told.sampled_tokens, told.mean_divergence, told.top1_agreement, told.max_divergence) == (4, 0.5, 0.75, 0.25)
    assert told.dense_from == 19
    assert not encode_report(SparsityReport("fovea", "", 5, 0, 0.5, replace(guard, dense_from=None))).guard.HasField(
        "dense_from"
    )


def test_what_the_engine_gets_names_the_policy_the_selector_and_the_profile(binder: Binder) -> None:
    found = decode_sparsity(pb.Sparsity(profile="cats"), binder)
    assert isinstance(found, SparseInference)
    assert found.selector.model is MODEL
