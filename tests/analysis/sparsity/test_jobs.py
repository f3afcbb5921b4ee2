"""What the jobs of SparsityService are made of: controls, parameters, progress, documents, overlap."""

import math

import pytest
import torch
from sparse_models import bound, documents, profile, sparse_model

from patchclamp_server.analysis.progress import Steps, unheard
from patchclamp_server.analysis.sparsity.calibrate import (
    CALIBRATIONS,
    KEPT_BYTES,
    MAX_TOKENS,
    SAMPLE_EVERY,
    calibrate,
    most_tokens,
)
from patchclamp_server.analysis.sparsity.control import asked_ratio, control_of
from patchclamp_server.analysis.sparsity.core_neurons import jaccard
from patchclamp_server.analysis.sparsity.evaluate import Evaluator
from patchclamp_server.analysis.sparsity.quality_card import measure_quality
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.sparsity.parameters import parameters_of, policy_with
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policy import PROJECTIONS, Policy

MODEL = sparse_model()


def test_the_control_of_a_policy_of_neurons_keeps_as_many_in_every_layer() -> None:
    made = profile("fovea")
    policy = Fovea(keep_ratio=0.4)
    selector = policy.bind(MODEL, made)
    assert len(set(selector.keep)) > 1
    control = control_of(policy, selector, MODEL, sparsity=0.6)
    assert control.keep == selector.keep
    for layer, keep in enumerate(selector.keep):
        chosen = control.fixed_set(control.begin(), layer)
        assert chosen is not None
        assert int(chosen.sum()) == round(keep * MODEL.spec.d_ff)


@pytest.mark.parametrize("name", ["teal", "wina"])
def test_the_control_of_a_policy_of_channels_reads_as_many_channels_of_every_product(name: str) -> None:
    policy = POLICIES[name](keep_ratio=0.25, first_layer=1)
    control = control_of(policy, bound(policy), MODEL, sparsity=0.5)
    widths = dict(zip(PROJECTIONS, (48, 48, 48, 80), strict=True))
    for projection, width in widths.items():
        mask = control.channels(1, projection, torch.randn(3, width))
        assert mask is not None
        assert mask.sum(1).tolist() == [width // 4] * 3
    assert control.is_dense(0)


def test_the_control_of_a_policy_without_a_ratio_keeps_what_that_one_was_found_to_keep() -> None:
    given = StaticSet(neurons={0: (1, 2)})
    for policy in (POLICIES["exact_zero"](), given):
        assert asked_ratio(policy) is None
        assert control_of(policy, policy.bind(MODEL), MODEL, sparsity=0.75).keep == (0.25,) * 3
    assert asked_ratio(POLICIES["griffin"](keep_ratio=(0.0, 0.5, 1.0))) == pytest.approx(0.5)


def test_a_random_set_is_not_its_own_control() -> None:
    policy = POLICIES["random"](keep_ratio=0.5)
    selector = policy.bind(MODEL)
    control = control_of(policy, selector, MODEL, sparsity=0.5)
    own, other = (s.fixed_set(s.begin(), 0) for s in (selector, control))
    assert own is not None
    assert other is not None
    assert not torch.equal(own, other)


@pytest.mark.parametrize(
    "policy",
    [
        *(policy() for policy in POLICIES.values()),
        Fovea(bits=4, gate="exact", compensate=False, budget="uniform", keep_ratio=(0.5, 1.0, 0.0), end_layer=2),
        POLICIES["coreinfer_similarity"](rank_by="value", token_keep=1.0, first_layer=1, keep_ratio=1.0),
    ],
)
def test_parameters_survive_json_that_has_only_doubles(policy: Policy) -> None:
    parameters = {k: float(v) if type(v) is int else v for k, v in parameters_of(policy).items()}
    assert policy_with(policy.name, parameters) == policy


@pytest.mark.parametrize(
    ("name", "parameters", "field"),
    [
        ("newest", {}, "policy"),
        ("griffin", {"bits": 3}, "bits"),
        ("fovea", {"bits": 3.5}, "bits"),
        ("fovea", {"bits": True}, "bits"),
        ("fovea", {"compensate": 1}, "compensate"),
        ("teal", {"allocation": 3}, "allocation"),
        ("griffin", {"keep_ratio": "half"}, "keep_ratio"),
        ("griffin", {"keep_ratio": [0.5, None]}, "keep_ratio"),
        ("griffin", {"first_layer": None}, "first_layer"),
        ("griffin", {"end_layer": math.inf}, "end_layer"),
        ("static_set", {"neurons": {}}, "neurons"),
    ],
)
def test_parameters_that_no_policy_has_are_refused_by_name(name: str, parameters: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        policy_with(name, parameters)
    assert refusal.value.field == f"sparsity.{field}"


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration_can_be_ended_after_a_document(name: str) -> None:
    class Ended(Exception):
        pass

    heard: list[tuple[str, int, int]] = []

    def hear(*step: object) -> None:
        heard.append(step)  # type: ignore[arg-type]
        raise Ended

    with pytest.raises(Ended):
        calibrate(POLICIES[name](), MODEL, documents(4, 512), progress=hear)
    assert heard == [("calibration", 1, 4 if name != "fovea" else 7)]


def test_the_quality_of_many_documents_is_that_of_evaluating_them_together() -> None:
    texts = documents(5, 24)
    selector = bound(POLICIES["cats"](keep_ratio=0.3))
    together = Evaluator(MODEL, texts, 12).quality(selector)
    card = measure_quality(MODEL, texts, selector, Steps(unheard, "quality", 5))
    assert card.perplexity_ratio == pytest.approx(together.perplexity_ratio, rel=1e-5)
    assert card.divergence == pytest.approx(together.divergence, rel=1e-4)
    assert card.top1_agreement == pytest.approx(together.top1_agreement)
    assert card.sparsity == pytest.approx(together.sparsity)
    assert (card.documents, card.scored_tokens) == (5, 5 * 11)


def test_a_card_that_is_not_finite_can_be_stored() -> None:
    card = measure_quality(MODEL, documents(1, 8), bound(POLICIES["dense"]()), Steps(unheard, "quality", 1))
    assert card.as_json()["sparsity"] == 0.0
    object.__setattr__(card, "perplexity_ratio", math.inf)
    assert card.as_json()["perplexity_ratio"] is None


def test_calibration_takes_as_many_tokens_as_its_samples_have_room_for() -> None:
    assert most_tokens(POLICIES["static_set"](), MODEL) == MAX_TOKENS
    widths = 3 * (48 + 48 + 48 + 80)
    assert most_tokens(POLICIES["teal"](), MODEL) == min(MAX_TOKENS, KEPT_BYTES * SAMPLE_EVERY // (4 * widths))


def test_the_overlap_of_two_sets() -> None:
    a, b, none = torch.tensor([1, 4, 6]), torch.tensor([4, 6, 7, 9]), torch.tensor([], dtype=torch.int64)
    assert jaccard(a, b) == 2 / 5
    assert (jaccard(a, a), jaccard(a, none), jaccard(none, none)) == (1.0, 0.0, 1.0)
