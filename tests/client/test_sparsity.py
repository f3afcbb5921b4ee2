"""Sparse inference: builders of policies, what the clients send, and what they make of the answers."""

from collections.abc import Callable
from typing import Any

import pytest
from canned import Generations, Sparsities

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp import sparsity as policies
from patchclamp.results import GuardReport, Progress, SparsityEvaluation
from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea, griffin, sparsity_message, static_set, teal
from patchclamp.v1 import sparse_policy_pb2 as pb
from patchclamp.v1 import sparsity_pb2

Serve = Callable[..., str]


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (policies.dense(), "dense"),
        (policies.exact_zero(), "exact_zero"),
        (policies.coreinfer_stability(), "coreinfer_stability"),
        (policies.coreinfer_similarity(), "coreinfer_similarity"),
        (policies.griffin(), "griffin"),
        (policies.teal(), "teal"),
        (policies.wina(), "wina"),
        (policies.cats(), "cats"),
        (policies.static_set(), "static_set"),
        (policies.fovea(), "fovea"),
        (policies.glance(), "glance"),
        (policies.random_set(), "random_set"),
        (policies.oracle(), "oracle"),
    ],
)
def test_every_builder_sets_its_own_policy(policy: pb.SparsePolicy, kind: str) -> None:
    assert policy.WhichOneof("policy") == kind


def test_no_policy_of_the_contract_is_without_a_builder() -> None:
    kinds = pb.SparsePolicy.DESCRIPTOR.oneofs_by_name["policy"].fields
    assert all(callable(getattr(policies, kind.name)) for kind in kinds)


def test_what_is_left_out_of_a_policy_stays_unset() -> None:
    policy = fovea()
    assert not any(policy.HasField(name) for name in ("keep_ratio", "end_layer"))
    assert not policy.fovea.HasField("bits")
    assert not policy.layer_keep_ratios


def test_a_ratio_and_a_layer_of_zero_are_sent() -> None:
    policy = cats(keep_ratio=0.0, first_layer=2, end_layer=0)
    assert policy.HasField("keep_ratio")
    assert policy.HasField("end_layer")
    assert (policy.keep_ratio, policy.first_layer, policy.end_layer) == (0.0, 2, 0)


def test_several_ratios_are_one_for_each_layer() -> None:
    policy = griffin(keep_ratio=[0.5, 0.25])
    assert list(policy.layer_keep_ratios) == [0.5, 0.25]
    assert not policy.HasField("keep_ratio")


def test_settings_of_a_policy_reach_its_message() -> None:
    kind = fovea(bits=2, exact_gate=True, without_compensation=True, uniform_budget=True).fovea
    assert (kind.bits, kind.exact_gate, kind.without_compensation, kind.uniform_budget) == (2, True, True, True)
    core = policies.coreinfer_stability(token_keep=0.25, rank_by="value").coreinfer_stability
    assert (core.token_keep, core.rank_by) == (0.25, pb.CORE_INFER_RANKING_VALUE)
    assert teal(allocation="greedy").teal.allocation == pb.TEAL_ALLOCATION_GREEDY
    assert static_set("french").static_set.neuron_set == "french"
    assert policies.random_set(seed=7).random_set.seed == 7


def test_a_word_that_no_setting_has_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'best' is unknown; accepted: uniform, greedy"):
        teal(allocation="best")


def test_a_text_is_a_profile_and_a_policy_is_one_without_a_profile() -> None:
    assert sparsity_message("mine") == pb.Sparsity(profile="mine")
    assert sparsity_message(cats()) == pb.Sparsity(policy=cats())
    assert sparsity_message(None) is None


def test_a_guard_without_settings_is_still_sent() -> None:
    message = Sparsity("mine", guard=QualityGuard()).message()
    assert message.HasField("guard")
    assert message.guard == pb.QualityGuard()
    assert not Sparsity("mine").message().HasField("guard")


def test_settings_of_a_guard_reach_its_message() -> None:
    guard = QualityGuard(sample_rate=0.5, max_divergence=0.0, window=4).message()
    assert (guard.sample_rate, guard.window) == (0.5, 4)
    assert guard.HasField("max_divergence")


def test_neither_profile_nor_policy_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="a profile, a policy or both"):
        Sparsity().message()
    with pytest.raises(ValueError, match="a profile, a policy or both"):
        sparsity_message("")


def test_generate_sends_the_sparsity_and_returns_its_report(serve: Serve) -> None:
    server = Generations()
    with Client(serve(generation=server)) as client:
        result = client.generate("hi", sparsity=Sparsity("mine", fovea(bits=3), QualityGuard())).result()
    assert server.request.sparsity == Sparsity("mine", fovea(bits=3), QualityGuard()).message()
    report = result.sparsity
    assert report is not None
    assert (report.policy, report.profile, report.sparse_tokens, report.active_ratio) == ("fovea", "mine", 1, 0.5)
    assert report.guard is not None
    assert (report.guard.sampled_tokens, report.guard.dense_from) == (8, 10)


def test_a_report_says_when_the_guard_fell_back(serve: Serve) -> None:
    with Client(serve(generation=Generations())) as client:
        guarded = client.generate("hi", sparsity=Sparsity("mine", guard=QualityGuard())).result()
        unguarded = client.generate("hi", sparsity="mine").result()
    assert "FELL BACK to dense from position 10" in str(guarded.sparsity)
    assert "0.2500 nats, 0.1250 allowed" in str(guarded.sparsity)
    assert str(unguarded.sparsity) == "sparsity fovea (mine): 1 sparse tokens, 1 dense, 50.0% computed"


def test_a_guard_that_did_not_fall_back_names_no_position() -> None:
    report = GuardReport.from_proto(pb.GuardReport(sampled_tokens=4, top1_agreement=1.0, max_divergence=0.125))
    assert report.dense_from is None
    assert str(report).endswith("same top token at 100% of 4 samples")


def test_a_dense_request_has_no_report(serve: Serve) -> None:
    server = Generations()
    with Client(serve(generation=server)) as client:
        assert client.generate("hi").result().sparsity is None
    assert not server.request.HasField("sparsity")


def test_score_session_and_compare_take_a_sparsity_too(serve: Serve) -> None:
    with Client(serve(generation=Generations())) as client:
        scored = client.score("hi", " you", sparsity=cats())
        with client.session("hi", sparsity=cats()) as session:
            spoken = session.result()
        compared = client.compare("hi", sparsity=cats()).result()
    for report in (scored.sparsity, spoken.sparsity, compared.edited.sparsity):
        assert report is not None
        assert report.policy == "cats"


def test_calibration_sends_policy_and_text_and_returns_the_card(serve: Serve) -> None:
    server = Sparsities()
    events: list[object] = []
    with Client(serve(sparsity=server)) as client:
        result = client.calibrate_profile(
            fovea(keep_ratio=0.5),
            ["one", "two"],
            document_tokens=64,
            text_description="two words",
            holdout_fraction=0.5,
            description="mine",
            tags=["mine"],
        ).result(events.append)
    text = sparsity_pb2.SparsityText(texts=["one", "two"], document_tokens=64, description="two words")
    assert server.request == sparsity_pb2.CalibrateProfileRequest(
        policy=fovea(keep_ratio=0.5), text=text, holdout_fraction=0.5, description="mine", tags=["mine"]
    )
    assert events == [Progress("calibration", 1, 2), result]
    assert (result.artifact.kind, result.quality.documents) == ("sparsity_profile", 2)
    assert (result.quality.perplexity_ratio, result.random_control.perplexity_ratio) == (1.0206, 99.3627)


def test_one_text_is_one_text(serve: Serve) -> None:
    server = Sparsities()
    with Client(serve(sparsity=server)) as client:
        client.calibrate_profile(cats(), "all of it").result()
    assert list(server.request.text.texts) == ["all of it"]
    assert not server.request.HasField("holdout_fraction")


def test_evaluations_come_in_the_order_asked_for(serve: Serve) -> None:
    server = Sparsities()
    events: list[object] = []
    with Client(serve(sparsity=server)) as client:
        stream = client.evaluate_profile([cats(keep_ratio=0.3), "mine"], "text", measure_speed=True)
        result = stream.result(events.append)
    assert [each.policy for each in result] == ["cats", "fovea"]
    assert [each.index for each in events if isinstance(each, SparsityEvaluation)] == [1, 0]
    assert server.request.measure_speed
    assert result[0].keep_ratio == 0.3
    assert result[0].speed is not None
    assert (result[0].speed.speedup, result[0].speed.tokens) == (1.25, 64)


def test_an_evaluation_without_timing_has_no_speed(serve: Serve) -> None:
    with Client(serve(sparsity=Sparsities())) as client:
        [evaluation] = client.evaluate_profile([cats()], "text").result()
    assert evaluation.speed is None
    assert evaluation.quality.bytes_read_16 == 0.682


class Interrupted(Sparsities):
    """Ends well, and too early."""

    def EvaluateProfile(self, request: Any, context: Any) -> Any:
        yield next(super().EvaluateProfile(request, context))


def test_an_evaluation_that_ends_early_has_no_result(serve: Serve) -> None:
    with Client(serve(sparsity=Interrupted())) as client, pytest.raises(PatchclampError, match="DATA_LOSS"):
        client.evaluate_profile([cats()], "text").result()


@pytest.mark.parametrize(("sparsities", "error"), [([], ValueError), ("mine", TypeError)])
def test_an_evaluation_needs_a_list_of_sparsities(sparsities: Any, error: type[Exception]) -> None:
    with Client() as client, pytest.raises(error):
        client.evaluate_profile(sparsities, "text")


def test_core_neurons_are_by_prompt_and_layer(serve: Serve) -> None:
    server = Sparsities()
    with Client(serve(sparsity=server)) as client:
        result = client.predict_core_neurons(["a", [5, 6]], griffin(keep_ratio=0.4), layers=[3, 4])
    assert list(server.request.layers) == [3, 4]
    assert server.request.prompts[0].text == "a"
    assert list(server.request.prompts[1].tokens.ids) == [5, 6]
    assert result.prompts[1][3] == (1, 2, 5)
    assert (result.overlaps[0].jaccard, result.overlaps[0].mean_jaccard) == ((0.5, 0.25), 0.375)


def test_one_text_in_place_of_several_prompts_is_refused() -> None:
    with Client() as client, pytest.raises(TypeError, match=r"prompts: expected several, each a prompt, got 'hello'"):
        client.predict_core_neurons("hello", griffin())


async def test_the_async_client_does_the_same(serve: Serve) -> None:
    address = serve(generation=Generations(), sparsity=Sparsities())
    async with AsyncClient(address) as client:
        generated = await client.generate("hi", sparsity="mine").result()
        calibrated = await client.calibrate_profile(cats(), "text").result()
        evaluated = await client.evaluate_profile([cats()], "text").result()
        core = await client.predict_core_neurons(["a", "b"], griffin())
    assert generated.sparsity is not None
    assert calibrated.quality == evaluated[0].quality
    assert len(core.prompts) == 2
