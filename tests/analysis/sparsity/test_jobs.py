"""What the jobs of SparsityService are made of: controls, parameters, progress, documents, overlap."""

import math
from contextlib import aclosing

import pytest
import torch
from engine_runs import loaded, started
from patience import PATIENCE_SECONDS
from sparse_models import NAMES, bound, calibrated, dense_run, documents, evaluated, profile, run, sparse_model

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.sparsity.calibrate import (
    CALIBRATIONS,
    KEPT_BYTES,
    MAX_TOKENS,
    SAMPLE_EVERY,
    calibrate_on,
    most_tokens,
)
from patchclamp_server.analysis.sparsity.control import asked_ratio, control_of
from patchclamp_server.analysis.sparsity.core_neurons import jaccard
from patchclamp_server.analysis.sparsity.evaluate import scored
from patchclamp_server.analysis.sparsity.quality_card import QualityCard, measure_quality
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.sparsity.parameters import parameters_of, policy_with
from patchclamp_server.sparsity.policies import POLICIES
from patchclamp_server.sparsity.policies.fovea import Fovea
from patchclamp_server.sparsity.policies.static_set import StaticSet
from patchclamp_server.sparsity.policies.teal import Teal
from patchclamp_server.sparsity.policy import PROJECTIONS, Policy
from patchclamp_server.sparsity.profile import Profile

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
async def test_calibration_can_be_ended_after_a_document(name: str) -> None:
    with started(loaded("llama")) as engine:
        async with aclosing(calibrate_on(engine, POLICIES[name](), documents(4, 128))) as job:
            assert await anext(job) == Progress("calibration", 1, 4 if name != "fovea" else 7)
        assert engine.drain(PATIENCE_SECONDS)


@pytest.mark.parametrize("name", CALIBRATIONS)
async def test_a_profile_does_not_depend_on_how_documents_are_cut(name: str) -> None:
    """In chunks, one beside the other, against each in one go."""
    policy = Teal(allocation="greedy") if name == "teal" else POLICIES[name]()
    config = EngineConfig(max_tokens_per_step=13, kv_block_size=4, kv_cache_tokens=128)
    texts = documents(5, 40, seed=7)
    with started(loaded("llama"), config) as engine:
        events = [event async for event in calibrate_on(engine, policy, texts)]
        prefilled = engine.stats().prefill_tokens
    expected = calibrated(policy, texts)
    *progress, found = events
    assert isinstance(found, Profile)
    total = 5 + (3 if name in ("teal", "fovea") else 0)
    assert progress == [Progress("calibration", n, total) for n in range(1, total + 1)]
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-4, atol=1e-5)
    assert found.card == expected.card
    # The damage of fovea is measured on two of them once more.
    assert prefilled == texts.numel() or name == "fovea"


async def test_documents_that_the_cache_has_no_room_for_are_refused_by_their_length() -> None:
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=16)
    with started(loaded("llama"), config) as engine, pytest.raises(InvalidArgument) as refusal:
        await anext(calibrate_on(engine, StaticSet(), documents(2, 32)))
    assert refusal.value.field == "text.document_tokens"


# Every prompt and text in one go, and in chunks of a cache that has no room for two.
WHOLE = EngineConfig(kv_cache_tokens=4096)
CROWDED = EngineConfig(kv_block_size=4, kv_cache_tokens=60, max_tokens_per_step=7)


@pytest.mark.parametrize("config", [WHOLE, CROWDED], ids=["whole", "crowded"])
@pytest.mark.parametrize("name", NAMES)
def test_quality_is_that_of_the_logits_of_masked_passes(name: str, config: EngineConfig) -> None:
    """In float64, from passes without an engine. Steps of few rows gather neurons, which are rounded otherwise."""
    tolerance = 1e-6 if config is WHOLE else 1e-5
    texts, prompt = documents(3, 40), 16
    selector = bound(POLICIES[name](keep_ratio=0.4))
    [found] = evaluated(texts, prompt, selector, config=config)
    targets = texts[:, prompt + 1 :]
    states, counted = run(MODEL, texts, prompt, [selector] * len(texts))
    log_p, log_q = (
        torch.stack([MODEL.decoder.logits(x)[:-1] for x in passes]).double().log_softmax(-1)
        for passes in (dense_run(MODEL, texts, prompt), states)
    )
    nll, sparse_nll = (-x.gather(-1, targets[:, :, None]).mean() for x in (log_p, log_q))
    assert found.perplexity_ratio == pytest.approx(float((sparse_nll - nll).exp()), abs=tolerance)
    assert found.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), abs=tolerance)
    assert found.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    # The last token of a text is computed by the pass, and not scored.
    rows = MODEL.n_layers * 3 * (40 - prompt)
    assert found.sparsity == pytest.approx(sum(sum(state.dropped().values()) for state in counted) / rows, abs=0.02)


async def test_documents_are_scored_densely_once_for_all_policies() -> None:
    """And their prompts once for those that need not see them, but for the block whose end predicts the first token."""
    texts, selectors = documents(2, 32), [bound(POLICIES[name]()) for name in ("cats", "fovea", "teal")]
    with started(loaded("llama"), EngineConfig(kv_block_size=4, kv_cache_tokens=1024)) as engine:
        found = [index async for index, _ in scored(engine, texts, 16, selectors)]
        stats = engine.stats()
    assert found == [0, 0, 1, 1, 2, 2]
    assert stats.scored_tokens == 4 * 2 * 16
    assert stats.prefill_tokens == 2 * (16 + 3 * 4)


async def test_an_evaluation_that_is_left_ends_its_requests() -> None:
    with started(loaded("llama")) as engine:
        async with aclosing(scored(engine, documents(4, 128), 64, [bound(POLICIES["cats"]())])) as job:
            await anext(job)
        assert engine.drain(PATIENCE_SECONDS)
        assert engine.stats().running == 0


async def test_a_card_counts_what_was_scored() -> None:
    selectors = [bound(POLICIES[name](keep_ratio=0.3)) for name in ("cats", "griffin")]
    with started(loaded("llama")) as engine:
        *progress, cats, griffin = [
            event async for event in measure_quality(engine, documents(5, 24), selectors, Steps("quality", 10))
        ]
    assert progress == [Progress("quality", n, 10) for n in range(1, 11)]
    for card in (cats, griffin):
        assert isinstance(card, QualityCard)
        assert (card.documents, card.scored_tokens) == (5, 5 * 11)


def test_a_card_that_is_not_finite_can_be_stored() -> None:
    card = QualityCard(1.0, 0.0, 1.0, 0.0, 1.0, documents=1, scored_tokens=3, dense_perplexity=7.5)
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
