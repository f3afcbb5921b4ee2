"""CalibrateVector through a real channel, against a naive loop of transformers with hooks on the tiny llama."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2, neuron_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.analysis.neurons.intervals import Items, interval_of
from patchclamp_server.analysis.steering.calibration.coherence import expectation_adjusted_distinct, repetition
from patchclamp_server.analysis.steering.calibration.job import random_vectors
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

PROMPTS = ["It was", "She has a", "Nobody"]
TOKENS = 8
VECTOR, RANDOM, PROMPT, UNSTEERED = (
    pb.CALIBRATION_ARM_VECTOR,
    pb.CALIBRATION_ARM_RANDOM,
    pb.CALIBRATION_ARM_PROMPT,
    pb.CALIBRATION_ARM_UNSTEERED,
)


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
        generator = torch.Generator().manual_seed(3)
        tensors = {f"layer.{layer}": torch.randn(info.d_model, generator=generator) for layer in (0, 1)}
        evidence = {"best_layer": 1, "layers": [{"layer": 1, "midpoint": 0.5}]}
        fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
        store.put(ArtifactKind.VECTOR, tensors, evidence=evidence, tags=["v"], description="up", **fields)
        yield server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[SteeringServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield SteeringServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def vector(server: LiveServer) -> dict[int, Tensor]:
    found = ArtifactStore(server.server.config.artifacts_url).get("v")
    return {layer: found.direction(layer) for layer in (0, 1)}


def request(**fields: Any) -> pb.CalibrateVectorRequest:
    given: dict[str, Any] = {
        "vector": "v",
        "layers": [1],
        "strengths": [-0.5, 0.0, 0.5, 4.0],
        "prompts": [generation_pb2.Prompt(text=text) for text in PROMPTS],
        "max_tokens": TOKENS,
        "random_vectors": 2,
        "max_repetition": 1.0,
        **fields,
    }
    return pb.CalibrateVectorRequest(**given)


def calibrated(stub: SteeringServiceStub, **fields: Any) -> pb.CalibrationResult:
    responses = list(stub.CalibrateVector(request(**fields)))
    result = responses[-1].result
    assert [each.point for each in responses if each.HasField("point")] == list(result.points)
    progress = [each.progress for each in responses if each.HasField("progress")]
    assert progress[-1].done == progress[-1].total
    return result


def point(result: pb.CalibrationResult, arm: int, strength: float = 0.0, layer: int = 1) -> pb.DosePoint:
    at = layer if arm in (VECTOR, RANDOM) else 0
    [found] = [p for p in result.points if (p.arm, p.strength, p.layer) == (arm, strength, at)]
    return found


@contextmanager
def added(model: PreTrainedModel, layer: int, delta: Tensor | None) -> Iterator[None]:
    """The output of a block, with `delta` at every token."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        return output[0] + delta if isinstance(output, tuple) else output + delta

    handle = None
    if delta is not None:
        handle = model.get_submodule(f"model.layers.{layer}").register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def predictions(model: PreTrainedModel, ids: list[int], layer: int = 1, delta: Tensor | None = None) -> Tensor:
    """Log-probabilities [T, vocab] of the token after each."""
    with added(model, layer, delta):
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def greedy(model: PreTrainedModel, ids: list[int], delta: Tensor | None, layer: int = 1) -> list[int]:
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    written: list[int] = []
    while len(written) < TOKENS and not ends & set(written):
        written.append(int(predictions(model, ids + written, layer, delta)[-1].argmax()))
    return written


def encoded(server: LiveServer, text: str) -> list[int]:
    return list(server.model.tokenizer.encode(text))


@torch.no_grad()
def states(model: PreTrainedModel, ids: list[int], layer: int = 1) -> Tensor:
    """[T, width] after a block."""
    kept: list[Tensor] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(f"model.layers.{layer}").register_forward_hook(keep)
    model(torch.tensor([ids]))
    handle.remove()
    return kept[0].reshape(len(ids), -1)


def projections(model: PreTrainedModel, ids: list[int], start: int, v: Tensor, layer: int = 1) -> list[float]:
    """h . v / |v| after a block, of the tokens from `start` on that are run."""
    return [float(h @ v / v.norm()) for h in states(model, ids, layer)[start:-1]]


def test_every_number_is_that_of_a_naive_loop(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    result = calibrated(stub)
    vocab = server.model.info.vocab_size
    for found, strength in [(point(result, UNSTEERED), 0.0)] + [
        (point(result, VECTOR, s), s) for s in (-0.5, 0.5, 4.0)
    ]:
        nll, kl, effects, repeated, distinct, tokens = 0.0, 0.0, list[float](), list[float](), list[float](), 0
        for text in PROMPTS:
            start = encoded(server, text)
            delta = strength * vector[1] if strength else None
            written = greedy(model, start, delta)
            plain = predictions(model, start + written)[len(start) - 1 : -1]
            steered = predictions(model, start + written, 1, delta)[len(start) - 1 : -1]
            nll -= float(plain.gather(1, torch.tensor(written)[:, None]).sum())
            kl += float((steered.exp() * (steered - plain)).sum())
            tokens += len(written)
            effects += projections(model, start + written, len(start), vector[1])
            repeated.append(repetition(written))
            distinct.append(expectation_adjusted_distinct(written, vocab))
        assert found.perplexity.mean == pytest.approx(math.exp(nll / tokens), rel=1e-4)
        assert found.divergence.mean == pytest.approx(kl / tokens, rel=1e-3, abs=1e-5)
        assert found.effect.mean == pytest.approx(sum(effects) / len(effects), rel=1e-4)
        assert found.repetition.mean == pytest.approx(sum(repeated) / len(repeated))
        assert found.distinct.mean == pytest.approx(sum(distinct) / len(distinct))
        for interval in (found.perplexity, found.divergence, found.effect, found.repetition, found.distinct):
            assert interval.low <= interval.mean * (1 + 1e-9) + 1e-9
            assert interval.high >= interval.mean * (1 - 1e-9) - 1e-9


def test_random_vectors_count_together_and_intervals_are_over_prompts(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    found = point(calibrated(stub, strengths=[0.5], seed=4), RANDOM, 0.5)
    x, w = torch.zeros(2, len(PROMPTS), dtype=torch.float64)
    for v in random_vectors(vector[1], 2, layer=1, seed=4):
        for i, text in enumerate(PROMPTS):
            start = encoded(server, text)
            own = projections(model, start + greedy(model, start, 0.5 * v), len(start), vector[1])
            x[i] += sum(own)
            w[i] += len(own)
    expected = interval_of(Items(x, w), lambda mean: mean, seed=4)
    assert (found.effect.mean, found.effect.low, found.effect.high) == pytest.approx(
        (expected.mean, expected.low, expected.high), rel=1e-4, abs=1e-4
    )


def test_the_projection_is_at_the_layer_of_the_best_evidence(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
    tensors = {f"layer.{layer}": v for layer, v in vector.items()}
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    made = store.put(ArtifactKind.VECTOR, tensors, evidence={"best_layer": 0}, **fields)
    result = calibrated(stub, vector=made.id, strengths=[0.5], random_vectors=1)
    effects = list[float]()
    for text in PROMPTS:
        start = encoded(server, text)
        effects += projections(model, start + greedy(model, start, None), len(start), vector[0], 0)
    assert point(result, UNSTEERED).effect.mean == pytest.approx(sum(effects) / len(effects), rel=1e-4)
    assert result.artifact.evidence["calibration"]["add"]["effect"]["layer"] == 0


def test_the_prompt_wins_where_it_reaches_more_than_the_knee(stub: SteeringServiceStub) -> None:
    fields: dict[str, Any] = {"max_perplexity_ratio": 1e200, "random_vectors": 1, "instruction": "Be glad."}
    never = pb.EffectMeasure(words={"words": ["no such word is ever said"]})
    for effect, strengths in ((None, [0.001]), (None, [-200.0, 200.0]), (never, [0.5])):
        result = calibrated(stub, strengths=strengths, effect=effect, **fields)
        at = point(result, VECTOR, result.strength) if result.strength else point(result, UNSTEERED)
        assert result.prompt_wins is (point(result, PROMPT).effect.mean > at.effect.mean)


def test_the_perplexity_of_the_unsteered_model_is_that_of_score(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    result = calibrated(stub, prompts=[generation_pb2.Prompt(text=PROMPTS[0])], strengths=[4.0])
    start = encoded(server, PROMPTS[0])
    written = greedy(model, start, 4.0 * vector[1])
    with grpc.insecure_channel(server.address) as channel:
        asked = generation_pb2.ScoreRequest(
            prompt=generation_pb2.Prompt(tokens={"ids": start}), tokens={"ids": written}
        )
        score = GenerationServiceStub(channel).Score(asked)
    assert point(result, VECTOR, 4.0).perplexity.mean == pytest.approx(score.perplexity, rel=1e-6)


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_the_effect_by_a_probe_is_its_mean_probability_or_number_over_the_text(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor], method: str
) -> None:
    store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
    w, b, said = torch.linspace(-1.0, 1.0, info.d_model), 0.25, {"method": method, "site": "resid_post"}
    # Of two labels, which share the odds.
    rows, bias = (torch.stack([w, -w]), torch.tensor([b, -b])) if method == "logistic" else (w[None], torch.tensor([b]))
    if method == "logistic":
        said |= {"labels": ["yes", "no"], "target": "yes"}
    tensors = {"layer.1.weight": rows, "bias": bias}
    made = store.put(ArtifactKind.PROBE, tensors, model_fingerprint=info.fingerprint, provenance=said, tags=[method])
    result = calibrated(stub, strengths=[4.0], effect=pb.EffectMeasure(probe=method))
    for found, strength in ((point(result, UNSTEERED), 0.0), (point(result, VECTOR, 4.0), 4.0)):
        values: list[float] = []
        for text in PROMPTS:
            start = encoded(server, text)
            written = greedy(model, start, strength * vector[1] if strength else None)
            scores = states(model, start + written)[len(start) : -1] @ w + b
            values += (torch.sigmoid(2 * scores) if method == "logistic" else scores).tolist()
        assert found.effect.mean == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
    card = store.info(result.artifact.id).evidence["calibration"]["add"]
    assert card["effect"] == {"measure": "probe", "probe": made.id}


def test_strength_zero_is_the_unsteered_model(stub: SteeringServiceStub) -> None:
    result = calibrated(stub)
    plain = point(result, UNSTEERED)
    assert plain.divergence.mean == 0.0
    for arm in (VECTOR, RANDOM):
        at_zero = point(result, arm)
        assert (at_zero.perplexity, at_zero.effect, at_zero.example) == (
            plain.perplexity,
            plain.effect,
            plain.example,
        )


def test_target_texts_are_scored_under_the_edit(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    texts = [" so good", " fine"]
    result = calibrated(stub, effect=pb.EffectMeasure(target_texts={"texts": texts}), instruction="Be glad.")
    for found, strength, before in (
        (point(result, UNSTEERED), 0.0, ""),
        (point(result, VECTOR, 4.0), 4.0, ""),
        (point(result, PROMPT), 0.0, "Be glad.\n\n"),
    ):
        total, tokens = 0.0, 0
        for prompt in PROMPTS:
            start = encoded(server, before + prompt)
            for text in texts:
                ids = server.model.tokenizer.encode(text, add_special_tokens=False)
                delta = strength * vector[1] if strength else None
                predicted = predictions(model, start + ids, 1, delta)[len(start) - 1 : -1]
                total += float(predicted.gather(1, torch.tensor(ids)[:, None]).sum())
                tokens += len(ids)
        assert found.effect.mean == pytest.approx(total / tokens, abs=1e-4)


def test_the_prompted_text_is_read_without_the_instruction(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel
) -> None:
    found = point(calibrated(stub, instruction="Be glad."), PROMPT)
    nll, kl, tokens = 0.0, 0.0, 0
    for text in PROMPTS:
        start, told = encoded(server, text), encoded(server, "Be glad.\n\n" + text)
        written = greedy(model, told, None)
        plain = predictions(model, start + written)[len(start) - 1 : -1]
        prompted = predictions(model, told + written)[len(told) - 1 : -1]
        nll -= float(plain.gather(1, torch.tensor(written)[:, None]).sum())
        kl += float((prompted.exp() * (prompted - plain)).sum())
        tokens += len(written)
    assert found.perplexity.mean == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found.divergence.mean == pytest.approx(kl / tokens, rel=1e-3)
    assert found.layer == 0


def test_words_are_looked_for_in_the_texts(stub: SteeringServiceStub) -> None:
    letters = [chr(i) for i in range(33, 90)]
    for words, share in ((letters, 1.0), (["no such word is ever said"], 0.0)):
        result = calibrated(stub, effect=pb.EffectMeasure(words={"words": words}), strengths=[0.5])
        assert point(result, UNSTEERED).effect.mean == share


def test_a_classifier_judges_the_texts(stub: SteeringServiceStub) -> None:
    groups = [
        {"label": label, "prompts": [generation_pb2.Prompt(text=f"{word} {i}") for i in range(4)]}
        for label, word in (("glad", "good sun"), ("sad", "bad rain"))
    ]
    effect = pb.EffectMeasure(classifier={"texts": {"groups": groups}, "target": "glad"})
    result = calibrated(stub, effect=effect, strengths=[0.5])
    # Bytes of a random model are no words that it knows.
    assert 0.2 < point(result, UNSTEERED).effect.mean < 0.8
    card = json.loads(json.dumps(dict(result.artifact.evidence["calibration"]["add"]["effect"])))
    assert (card["measure"], card["target"], card["heldout_accuracy"]) == ("classifier", "glad", 1.0)


def test_the_vector_is_stored_anew_with_the_calibration_that_generate_warns_by(
    server: LiveServer, stub: SteeringServiceStub
) -> None:
    bounds = {"max_perplexity_ratio": 1e9, "strengths": [-0.5, 0.25, 0.5]}
    result = calibrated(stub, tags=["calibrated"], replace_tags=True, **bounds)
    store = ArtifactStore(server.server.config.artifacts_url)
    old, new = store.get("v"), store.get("calibrated")
    assert result.artifact.id == new.info.id != old.info.id
    assert all(torch.equal(new.tensors[name], old.tensors[name]) for name in old.tensors)
    assert new.info.description == "up"
    assert new.info.provenance["calibrated_from"] == old.info.id
    assert new.info.evidence["layers"] == old.info.evidence["layers"]
    card = new.info.evidence["calibration"]["add"]
    assert card["safe"] == [{"layer": 1, "low": -0.5, "high": 0.5}]
    assert [(s.layer, s.low, s.high) for s in result.safe] == [(1, -0.5, 0.5)]
    assert (card["layer"], card["strength"]) == (result.layer, result.strength)
    assert len(card["points"]) == len(result.points) == 7
    with grpc.insecure_channel(server.address) as channel:
        for strength, warned in ((0.5, False), (-0.5, False), (0.6, True), (-0.6, True)):
            edit = program_pb2.Edit(site="SITE_RESID_POST", layers=[1], strength=strength)
            edit.add.vector.artifact = "calibrated"
            asked = generation_pb2.ScoreRequest(
                prompt=generation_pb2.Prompt(text="a"), text="b", program=program_pb2.Program(edits=[edit])
            )
            codes = {w.code for w in GenerationServiceStub(channel).Score(asked).receipt.warnings}
            assert (program_pb2.REQUEST_WARNING_CODE_BEYOND_SAFE_RANGE in codes) == warned


def test_another_application_is_kept_beside_the_first(server: LiveServer, stub: SteeringServiceStub) -> None:
    first = calibrated(stub, strengths=[0.5])
    second = calibrated(stub, vector=first.artifact.id, rotate_towards=True, strengths=[0.2, 0.4])
    cards = second.artifact.evidence["calibration"]
    assert set(cards) == {"add", "rotate_towards"}
    third = calibrated(stub, vector=second.artifact.id, replace=True, strengths=[0.1])
    assert set(third.artifact.evidence["calibration"]) == {"add", "rotate_towards", "replace"}
    turned = point(second, VECTOR, 0.4)
    assert turned.divergence.mean > point(second, VECTOR, 0.2).divergence.mean > 0.0


def test_text_beyond_a_bound_ends_the_safe_range(stub: SteeringServiceStub) -> None:
    strengths = [-4.0, -0.5, 0.5, 4.0]
    first = calibrated(stub, strengths=strengths)
    plain = point(first, UNSTEERED).perplexity.mean
    ratios = {s: point(first, VECTOR, s).perplexity.mean / plain for s in strengths}
    bound = (min(ratios.values()) + max(ratios.values())) / 2
    [found] = calibrated(stub, strengths=strengths, max_perplexity_ratio=bound).safe
    expected = [
        0.0 if ratios[near] > bound else near if ratios[far] > bound else far
        for near, far in ((-0.5, -4.0), (0.5, 4.0))
    ]
    assert [found.low, found.high] == expected != [-4.0, 4.0]


def test_text_that_repeats_more_than_the_bound_ends_the_safe_range(stub: SteeringServiceStub) -> None:
    """The model says one letter 24 times, so that 20 of 21 4-grams came before."""
    fields: dict[str, Any] = {"strengths": [-0.5, 0.5], "max_tokens": 24, "random_vectors": 1}
    for bound, expected in ((0.94, (0.0, 0.0)), (0.96, (-0.5, 0.5))):
        result = calibrated(stub, max_repetition=bound, max_perplexity_ratio=1e200, **fields)
        assert [point(result, VECTOR, s).repetition.mean for s in (-0.5, 0.5)] == pytest.approx([20 / 21] * 2)
        assert [(each.low, each.high) for each in result.safe] == [expected]


def test_without_strengths_the_change_is_a_tenth_to_twice_the_norm(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel, vector: dict[int, Tensor]
) -> None:
    texts = ["It", "It was a long day, and nobody came."]
    prompts = [generation_pb2.Prompt(text=text) for text in texts]
    result = calibrated(stub, strengths=[], layers=[], prompts=prompts, max_tokens=2)
    assert {p.layer for p in result.points if p.arm == VECTOR} == {0, 1}
    strengths = [p.strength for p in result.points if p.arm == VECTOR and p.layer == 1]
    assert len(strengths) == 8
    assert strengths == sorted(strengths)
    # The norm is that of all tokens of all prompts, without attention sinks.
    found = [states(model, encoded(server, text), 1) for text in texts]
    norm = float(torch.cat([h[ordinary_tokens(h)].norm(dim=1) for h in found]).mean())
    unit = norm / float(vector[1].norm())
    assert (strengths[0], strengths[-1]) == pytest.approx((0.1 * unit, 2.0 * unit), rel=1e-2)


def test_a_vector_whose_norm_is_beyond_its_own_type_has_default_strengths(
    server: LiveServer, stub: SteeringServiceStub
) -> None:
    store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    v = torch.full((info.d_model,), 50_000.0, dtype=torch.float16)
    assert v.norm().isinf()
    made = store.put(ArtifactKind.VECTOR, {"layer.1": v}, **fields)
    result = calibrated(stub, vector=made.id, strengths=[], prompts=[generation_pb2.Prompt(text="It")], max_tokens=2)
    strengths = [p.strength for p in result.points if p.arm == VECTOR]
    assert strengths[-1] / strengths[0] == pytest.approx(20.0, rel=1e-2)


def test_the_same_seed_gives_the_same_calibration(stub: SteeringServiceStub) -> None:
    first, again, other = (calibrated(stub, strengths=[0.5], seed=seed) for seed in (1, 1, 2))
    assert point(first, RANDOM, 0.5) == point(again, RANDOM, 0.5)
    assert point(first, RANDOM, 0.5).effect.mean != point(other, RANDOM, 0.5).effect.mean


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"vector": ""}, "INVALID_ARGUMENT", "vector"),
        ({"vector": "unknown"}, "NOT_FOUND", "vector"),
        ({"layers": [0, 5]}, "INVALID_ARGUMENT", "layers[1]"),
        ({"strengths": [1.0, 0.5]}, "INVALID_ARGUMENT", "strengths[1]"),
        ({"strengths": [0.0]}, "INVALID_ARGUMENT", "strengths"),
        ({"strengths": [math.nan]}, "INVALID_ARGUMENT", "strengths[0]"),
        ({"strengths": [-0.1], "rotate_towards": True}, "INVALID_ARGUMENT", "strengths[0]"),
        ({"add": False}, "INVALID_ARGUMENT", "add"),
        ({"prompts": []}, "INVALID_ARGUMENT", "prompts"),
        ({"prompts": [generation_pb2.Prompt(text="a" * 250)]}, "INVALID_ARGUMENT", "prompts[0]"),
        ({"instruction": "a" * 250}, "INVALID_ARGUMENT", "instruction"),
        (
            {"instruction": "a", "prompts": [generation_pb2.Prompt(tokens={"ids": [1]})]},
            "INVALID_ARGUMENT",
            "prompts[0].tokens",
        ),
        ({"max_tokens": 10_000}, "INVALID_ARGUMENT", "max_tokens"),
        ({"random_vectors": 1000}, "INVALID_ARGUMENT", "random_vectors"),
        ({"max_repetition": 1.5}, "INVALID_ARGUMENT", "max_repetition"),
        ({"max_perplexity_ratio": -1.0}, "INVALID_ARGUMENT", "max_perplexity_ratio"),
        ({"effect": pb.EffectMeasure(probe="v")}, "INVALID_ARGUMENT", "effect.probe"),
        ({"effect": pb.EffectMeasure(probe="")}, "INVALID_ARGUMENT", "effect.probe"),
        ({"effect": pb.EffectMeasure(probe="unknown")}, "NOT_FOUND", "effect.probe"),
        ({"effect": pb.EffectMeasure(words=neuron_pb2.Words())}, "INVALID_ARGUMENT", "effect.words.words"),
        (
            {"effect": pb.EffectMeasure(target_texts={"texts": [""]})},
            "INVALID_ARGUMENT",
            "effect.target_texts.texts[0]",
        ),
        ({"effect": pb.EffectMeasure(projection=False)}, "INVALID_ARGUMENT", "effect.projection"),
        (
            {"effect": pb.EffectMeasure(classifier={"target": "a"})},
            "INVALID_ARGUMENT",
            "effect.classifier.texts.groups",
        ),
        (
            {"scope": program_pb2.Scope(include=[program_pb2.TokenSelector(role="user")])},
            "INVALID_ARGUMENT",
            "scope.include[0].role",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_its_field(
    stub: SteeringServiceStub, fields: dict[str, Any], status: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CalibrateVector(request(**fields)))
    refused = failure(caught.value)
    assert refused.code.name == status
    assert refused.message.startswith(f"{field}: ")


def test_a_vector_that_is_none_is_refused(server: LiveServer, stub: SteeringServiceStub) -> None:
    store = ArtifactStore(server.server.config.artifacts_url)
    neurons = {"layer.0.neurons": torch.tensor([1])}
    made = store.put(ArtifactKind.NEURON_SET, neurons, model_fingerprint=server.model.info.fingerprint)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CalibrateVector(request(vector=made.id)))
    assert failure(caught.value).message.startswith("vector: ")


def test_a_vector_that_is_zero_is_refused(server: LiveServer, stub: SteeringServiceStub) -> None:
    store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    made = store.put(ArtifactKind.VECTOR, {"layer.1": torch.zeros(info.d_model)}, **fields)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CalibrateVector(request(vector=made.id, strengths=[])))
    assert failure(caught.value).message.startswith("vector: is zero at layer 1")


@pytest.mark.parametrize(("size", "strengths", "field"), [(1e37, [1e3], "strengths"), (3e38, [], "vector")])
def test_what_no_state_can_take_is_refused_at_a_field_of_the_request(
    server: LiveServer, stub: SteeringServiceStub, size: float, strengths: list[float], field: str
) -> None:
    """Programs are made of the request, and the client has sent none."""
    store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    made = store.put(ArtifactKind.VECTOR, {"layer.1": torch.full((info.d_model,), size)}, **fields)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CalibrateVector(request(vector=made.id, strengths=strengths)))
    assert failure(caught.value).fields == [field]


def test_a_cancelled_calibration_leaves_nothing_in_the_engine(server: LiveServer, stub: SteeringServiceStub) -> None:
    call = stub.CalibrateVector(request(random_vectors=30))
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    stats = server.server.engine.stats()
    while stats.running or stats.waiting:
        stats = server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
