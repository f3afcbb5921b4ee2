"""DetectConcept through a real channel, against hooks of transformers on the tiny llama and scikit-learn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from sklearn.metrics import average_precision_score, roc_auc_score
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.analysis.calibration import platt
from patchclamp_server.analysis.neurons.localize.holdout import held_out
from patchclamp_server.analysis.steering.detection.job import RANDOM_DIRECTIONS
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAST, MEAN, MAX = (
    pb.DETECTION_POOLING_LAST_TOKEN,
    pb.DETECTION_POOLING_MEAN,
    pb.DETECTION_POOLING_MAX,
)
GLAD = ["good sun today", "fine day of 2", "happy birds, 3", "sweet tea 4", "a feast for 5", "joy"]
SAD = ["bad rain again", "no luck of 2", "grey sky, three", "cold feet 4", "a loss for 5", "tears"]
VECTORS = {"v": (Site.RESID_POST, (0, 1)), "w": (Site.RESID_POST, (1,)), "mid": (Site.RESID_MID, (0,))}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        store, info = ArtifactStore(server.server.config.artifacts_url), server.model.info
        generator = torch.Generator().manual_seed(3)
        for tag, (site, layers) in VECTORS.items():
            tensors = {f"layer.{layer}": torch.randn(info.d_model, generator=generator) for layer in layers}
            store.put(ArtifactKind.VECTOR, tensors, model_fingerprint=info.fingerprint, site=site, tags=[tag])
        yield server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[SteeringServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield SteeringServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def groups(**labelled: list[str]) -> dict[str, Any]:
    return {
        "groups": [
            {"label": label, "prompts": [generation_pb2.Prompt(text=text) for text in texts]}
            for label, texts in labelled.items()
        ]
    }


def request(**fields: Any) -> pb.DetectConceptRequest:
    given = {"detectors": ["v"], "texts": groups(glad=GLAD, sad=SAD), "target": "glad", **fields}
    return pb.DetectConceptRequest(**given)


def detected(stub: SteeringServiceStub, **fields: Any) -> tuple[list[pb.DetectedText], pb.DetectionResult]:
    responses = list(stub.DetectConcept(request(**fields)))
    texts = [response.text for response in responses if response.HasField("text")]
    return texts, responses[-1].result


@torch.no_grad()
def states(server: LiveServer, model: PreTrainedModel, text: str, layer: int) -> tuple[Tensor, Tensor]:
    """States of all tokens of a text but the first, and which are no attention sinks (interventions/pooling.py)."""
    kept: list[Tensor] = []
    module = model.get_submodule(f"model.layers.{layer}")
    handle = module.register_forward_hook(lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
    ids = server.model.tokenizer.encode(text)
    model(torch.tensor([ids]))
    handle.remove()
    found = kept[0].reshape(len(ids), -1)[1:]
    norms = found.norm(dim=1)
    return found, norms <= 3.0 * norms.median()


def pooled(server: LiveServer, model: PreTrainedModel, text: str, v: Tensor, layer: int) -> dict[int, float]:
    found, ordinary = states(server, model, text, layer)
    values = found @ v / v.norm()
    return {LAST: float(values[ordinary][-1]), MEAN: float(values[ordinary].mean()), MAX: float(values.max())}


def test_scores_are_projections_pooled_as_by_hooks(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel
) -> None:
    texts, result = detected(stub, detectors=["v", "w"])
    assert [(r.detector, r.layer, r.pooling) for r in result.detectors] == [
        (name, layer, pooling) for name, layer in (("v", 0), ("v", 1), ("w", 1)) for pooling in (LAST, MEAN, MAX)
    ]
    assert [(each.text, each.label) for each in texts] == [(i, "glad" if i < 6 else "sad") for i in range(12)]
    store = ArtifactStore(server.server.config.artifacts_url)
    for text, each in zip([*GLAD, *SAD], texts, strict=True):
        expected = [
            pooled(server, model, text, store.get(r.detector).direction(r.layer), r.layer)[r.pooling]
            for r in result.detectors
        ]
        assert list(each.scores) == pytest.approx(expected, abs=1e-4)


def test_a_token_that_is_left_over_for_a_window_of_its_own_is_a_sink_and_not_read(stub: SteeringServiceStub) -> None:
    cut = [text.ljust(16, ".")[:16] for text in (*GLAD, *SAD)]
    whole, _ = detected(stub, texts={**groups(glad=cut[:6], sad=cut[6:]), "window_tokens": 16})
    longer, _ = detected(
        stub, texts={**groups(glad=[f"{c}x" for c in cut[:6]], sad=[f"{c}y" for c in cut[6:]]), "window_tokens": 16}
    )
    for own, other in zip(longer, whole, strict=True):
        assert list(own.scores) == list(other.scores)


def test_the_reports_are_of_the_texts_that_the_calibration_has_not_seen(stub: SteeringServiceStub) -> None:
    texts, result = detected(stub, calibration_fraction=0.5)
    scores = np.array([each.scores for each in texts])
    y = np.array([each.label == "glad" for each in texts])
    for column, report in enumerate(result.detectors):
        p = 1 / (1 + np.exp(-(report.slope * scores[:, column] + report.intercept)))
        # Which three of six of either label are left is the seed's.
        triples = [[i, j, k] for i in range(6) for j in range(i) for k in range(j)]
        rests = [np.array([*a, *(6 + np.array(b))]) for a in triples for b in triples]
        own = scores[:, column]
        measured = [
            (roc_auc_score(y[r], own[r]), average_precision_score(y[r], own[r]), np.mean((p[r] - y[r]) ** 2))
            for r in rests
        ]
        reported = (report.auroc.mean, report.average_precision.mean, report.brier)
        assert any(reported == pytest.approx(each, abs=1e-6) for each in measured)
        assert report.auroc.low <= report.auroc.mean <= report.auroc.high
        assert report.brier_base_rate == pytest.approx(0.25)
        assert sum(each.texts for each in report.reliability) == 6
        assert 0.0 <= report.random_auroc <= 1.0
    best = max(range(len(result.detectors)), key=lambda i: result.detectors[i].auroc.mean)
    assert result.best == best
    assert result.texts == 12


def test_a_detector_is_calibrated_by_some_texts_and_reported_on_the_others(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel
) -> None:
    sad = [*SAD, "a dull day", "lost keys 8", "too late, 9", "the last bus is gone"]
    fields = {"texts": groups(glad=GLAD, sad=sad), "calibration_fraction": 0.4, "seed": 5, "layers": [1]}
    texts, result = detected(stub, poolings=[LAST, MAX], **fields)
    y = np.arange(16) < 6
    fits = held_out(y.astype(np.int64), 0.4, 5)
    scores = np.array([each.scores for each in texts])
    random = torch.randn(RANDOM_DIRECTIONS, server.model.info.d_model, generator=torch.Generator().manual_seed(5))
    for column, report in enumerate(result.detectors):
        own = platt(scores[fits, column], y[fits])
        assert (report.slope, report.intercept) == pytest.approx((own.slope, own.intercept), rel=1e-4)
        assert report.brier_base_rate == pytest.approx(np.mean((y[fits].mean() - y[~fits]) ** 2))
        chance = []
        for v in random:
            drawn = np.array([pooled(server, model, text, v, 1)[report.pooling] for text in (*GLAD, *sad)])
            turned = drawn if roc_auc_score(y[fits], drawn[fits]) >= 0.5 else -drawn
            chance.append(roc_auc_score(y[~fits], turned[~fits]))
        assert min(chance) < 0.5
        assert report.random_auroc == pytest.approx(np.mean(chance))


def test_a_long_text_is_scored_over_all_its_windows(
    server: LiveServer, stub: SteeringServiceStub, model: PreTrainedModel
) -> None:
    long = "It rained all day, and nobody came to the door."
    opening = len(server.model.tokenizer.encode("")) if server.model.tokenizer.encode("") else 0
    size = 16 - opening
    source = {**groups(one=[long, "short"]), "window_tokens": 16}
    (text, _), result = detected(stub, texts=source, target="", layers=[1])
    v = ArtifactStore(server.server.config.artifacts_url).get("v").direction(1)
    parts = [long[start : start + size] for start in range(0, len(long), size)]
    windows = [pooled(server, model, part, v, 1) for part in parts]
    assert [r.pooling for r in result.detectors] == [LAST, MEAN, MAX]
    assert text.scores[0] == pytest.approx(windows[-1][LAST], abs=1e-4)
    assert text.scores[2] == pytest.approx(max(each[MAX] for each in windows), abs=1e-4)
    ordinary = [found[own] for found, own in (states(server, model, part, 1) for part in parts)]
    assert text.scores[1] == pytest.approx(float((torch.cat(ordinary) @ v / v.norm()).mean()), abs=1e-4)


def test_texts_without_a_target_are_scored_alone(stub: SteeringServiceStub) -> None:
    texts, result = detected(stub, target="", poolings=[MEAN], layers=[1])
    assert [len(each.scores) for each in texts] == [1] * 12
    [report] = result.detectors
    assert not report.HasField("auroc")
    assert not result.warnings


def test_detectors_of_several_sites_are_read_together(stub: SteeringServiceStub) -> None:
    together, result = detected(stub, detectors=["v", "mid"], layers=[0], poolings=[LAST, MAX])
    alone, _ = detected(stub, detectors=["mid"], layers=[0], poolings=[LAST, MAX])
    assert [(r.detector, r.pooling) for r in result.detectors] == [("v", LAST), ("v", MAX), ("mid", LAST), ("mid", MAX)]
    for both, own in zip(together, alone, strict=True):
        assert list(both.scores[2:]) == pytest.approx(list(own.scores), abs=1e-5)


def test_scores_come_while_later_texts_still_run(server: LiveServer, stub: SteeringServiceStub) -> None:
    call = stub.DetectConcept(request(texts=groups(glad=GLAD * 40, sad=SAD * 40)))
    first = next(call)
    assert (first.text.text, first.text.label) == (0, "glad")
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    stats = server.server.engine.stats()
    while stats.running or stats.waiting:
        stats = server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"detectors": []}, "INVALID_ARGUMENT", "detectors"),
        ({"detectors": ["v", ""]}, "INVALID_ARGUMENT", "detectors[1]"),
        ({"detectors": ["v", "v"]}, "INVALID_ARGUMENT", "detectors[1]"),
        ({"detectors": ["unknown"]}, "NOT_FOUND", "detectors[0]"),
        ({"features": [{"autoencoder": "sae", "feature": 3}]}, "NOT_FOUND", "features[0].autoencoder"),
        ({"layers": [1, 7]}, "INVALID_ARGUMENT", "layers[1]"),
        ({"detectors": ["w"], "layers": [0]}, "INVALID_ARGUMENT", "detectors[0]"),
        ({"poolings": [MEAN, 9]}, "INVALID_ARGUMENT", "poolings[1]"),
        ({"poolings": [MEAN, MEAN]}, "INVALID_ARGUMENT", "poolings[1]"),
        ({"target": "angry"}, "INVALID_ARGUMENT", "target"),
        ({"texts": {}}, "INVALID_ARGUMENT", "texts.groups"),
        ({"texts": groups(glad=GLAD, sad=["one"])}, "INVALID_ARGUMENT", "texts"),
        ({"calibration_fraction": 1.0}, "INVALID_ARGUMENT", "calibration_fraction"),
        ({"texts": {**groups(glad=GLAD, sad=SAD), "window_tokens": 5000}}, "INVALID_ARGUMENT", "texts.window_tokens"),
    ],
)
def test_what_cannot_be_detected_is_refused_by_its_field(
    stub: SteeringServiceStub, fields: dict[str, Any], status: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.DetectConcept(request(**fields)))
    refused = failure(caught.value)
    assert refused.code.name == status
    assert refused.message.startswith(f"{field}: ")
