"""DetectConcept with probes and features: scores are those of scikit-learn and numpy on states from plain hooks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.analysis.neurons.localize.holdout import held_out
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAST, MEAN, MAX = pb.DETECTION_POOLING_LAST_TOKEN, pb.DETECTION_POOLING_MEAN, pb.DETECTION_POOLING_MAX
TEXTS = {
    "glad": ["good sun today", "fine day of 2", "happy birds, 3", "sweet tea 4", "a feast for 5", "joy"],
    "sad": ["bad rain again", "no luck of 2", "grey sky, three", "cold feet 4", "a loss for 5", "tears"],
    "odd": ["seven of nine", "a 1 and a 2", "zig and zag", "left", "one more, 5", "the end"],
}
ALL = [text for texts in TEXTS.values() for text in texts]
LABELS = np.repeat([0, 1, 2], 6)
CALIBRATION = (1.5, -0.25)
FEATURES = 12
States = dict[int, np.ndarray]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[SteeringServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield SteeringServiceStub(channel)


@pytest.fixture(scope="module")
def states(server: LiveServer, tiny_llama_dir: Path) -> list[States]:
    """Of each text by layer, resid_post [tokens, width]."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    return [hooked(model, server.model.tokenizer.encode(text)) for text in ALL]


@torch.no_grad()
def hooked(model: PreTrainedModel, ids: list[int]) -> States:
    kept: States = {}

    def keeping(layer: int) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            kept[layer] = (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1).double().numpy()

        return hook

    handles = [block.register_forward_hook(keeping(i)) for i, block in enumerate(model.model.layers)]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return kept


def ordinary(h: np.ndarray) -> np.ndarray:
    """Which tokens but the first are no attention sinks (interventions/pooling.py)."""
    norms = np.linalg.norm(h[1:], axis=1)
    return norms <= 3.0 * np.sort(norms)[(len(norms) - 1) // 2]


def pooled(own: States, layers: tuple[int, ...], pooling: int) -> np.ndarray:
    """The states that a probe of these layers reads, one row; of MAX those of every token but the first."""
    if pooling == MAX:
        return np.concatenate([own[layer][1:] for layer in layers], axis=1)
    kept = [own[layer][1:][ordinary(own[layer])] for layer in layers]
    return np.concatenate([h[-1] if pooling == LAST else h.mean(0) for h in kept])[None]


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def put_probe(server: LiveServer, tag: str, model: Any, layers: tuple[int, ...], labels: list[str]) -> None:
    """Stores what scikit-learn fitted to concatenated states; the target of a classifier is the first label."""
    rows, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    if len(labels) == 2:
        # scikit-learn has one row, for its second class.
        rows, bias = np.concatenate([0 * rows, rows]), np.concatenate([0 * bias, bias])
    width = rows.shape[1] // len(layers)
    tensors = {
        f"layer.{layer}.weight": torch.tensor(rows[:, i * width : (i + 1) * width]).float().contiguous()
        for i, layer in enumerate(layers)
    }
    tensors["bias"] = torch.tensor(bias).float()
    said: dict[str, Any] = {"method": "ridge", "site": "resid_post"}
    if labels:
        said |= {"method": "logistic", "labels": labels, "target": labels[0]}
        tensors["calibration"] = torch.tensor(CALIBRATION)
    store, fingerprint = ArtifactStore(server.server.config.artifacts_url), server.model.info.fingerprint
    store.put(ArtifactKind.PROBE, tensors, model_fingerprint=fingerprint, provenance=said, tags=[tag])


def groups() -> dict[str, Any]:
    return {
        "groups": [
            {"label": label, "prompts": [generation_pb2.Prompt(text=text) for text in texts]}
            for label, texts in TEXTS.items()
        ]
    }


def detected(stub: SteeringServiceStub, **fields: Any) -> tuple[np.ndarray, pb.DetectionResult]:
    """Scores [texts, columns], and the result."""
    responses = list(stub.DetectConcept(pb.DetectConceptRequest(texts=groups(), target="glad", **fields)))
    scores = [list(response.text.scores) for response in responses if response.HasField("text")]
    return np.array(scores), responses[-1].result


@pytest.mark.parametrize("layers", [(1,), (0, 1)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("kinds", [2, 3, 0], ids=["two labels", "three labels", "a number"])
def test_scores_of_a_probe_are_the_log_odds_of_scikit_learn(
    server: LiveServer, stub: SteeringServiceStub, states: list[States], layers: tuple[int, ...], kinds: int
) -> None:
    x = np.concatenate([pooled(own, layers, MEAN) for own in states])
    y = np.minimum(LABELS, max(kinds - 1, 1))
    model = LogisticRegression(C=10.0, max_iter=1000).fit(x, y) if kinds else Ridge().fit(x, LABELS)
    tag = f"probe-{len(layers)}-{kinds}"
    put_probe(server, tag, model, layers, list(TEXTS)[:kinds])
    scores, result = detected(stub, detectors=[tag])
    assert [(r.detector, r.layer, r.pooling) for r in result.detectors] == [(tag, 1, p) for p in (LAST, MEAN, MAX)]
    for own, found in zip(states, scores, strict=True):
        for score, pooling in zip(found, (LAST, MEAN, MAX), strict=True):
            h = pooled(own, layers, pooling)
            expected = model.predict(h) if not kinds else CALIBRATION[0] * logit(model.predict_proba(h)[:, 0])
            assert score == pytest.approx(np.max(expected) + (CALIBRATION[1] if kinds else 0.0), abs=2e-3)


def test_the_report_of_a_probe_is_that_of_scikit_learn_on_the_texts_that_were_left(
    server: LiveServer, stub: SteeringServiceStub, states: list[States]
) -> None:
    x = np.concatenate([pooled(own, (1,), MEAN) for own in states])
    noise = np.random.default_rng(0).permutation(LABELS == 0)
    put_probe(server, "noisy", LogisticRegression(C=0.1).fit(x, ~noise), (1,), ["glad", "other"])
    scores, result = detected(stub, detectors=["noisy"], poolings=[MEAN], seed=3)
    [report] = result.detectors
    y = LABELS == 0
    rest = ~held_out(y.astype(np.int64), 0.5, 3)
    own = scores[rest, 0]
    p = 1 / (1 + np.exp(-(report.slope * own + report.intercept)))
    assert report.auroc.mean == pytest.approx(roc_auc_score(y[rest], own))
    assert report.average_precision.mean == pytest.approx(average_precision_score(y[rest], own))
    assert report.brier == pytest.approx(brier_score_loss(y[rest], p))
    assert 0.0 <= report.random_auroc <= 1.0


@pytest.fixture(scope="module")
def autoencoder(server: LiveServer) -> dict[str, Tensor]:
    """At layer 0, as "sae", and one that is of topk as "topk"."""
    width = server.model.info.sites[Site.RESID_POST]
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "encoder": torch.randn(FEATURES, width, generator=generator),
        "encoder_bias": torch.randn(FEATURES, generator=generator),
        "decoder": torch.randn(FEATURES, width, generator=generator),
        "decoder_bias": torch.randn(width, generator=generator) * 0.1,
        "threshold": torch.full((FEATURES,), 0.5),
    }
    store, fingerprint = ArtifactStore(server.server.config.artifacts_url), server.model.info.fingerprint
    said: dict[str, Any] = {"layer": 0, "function": "jumprelu", "subtracted": "decoder_bias"}
    options: dict[str, Any] = {"model_fingerprint": fingerprint, "site": Site.RESID_POST}
    store.put(ArtifactKind.AUTOENCODER, tensors, provenance=said, tags=["sae"], **options)
    of_topk = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
    said |= {"function": "topk", "k": 4}
    store.put(ArtifactKind.AUTOENCODER, of_topk, provenance=said, tags=["topk"], **options)
    vector = {"layer.0": torch.randn(width, generator=generator)}
    store.put(ArtifactKind.VECTOR, vector, tags=["v"], **options)
    return tensors


def test_scores_of_features_are_their_activations_pooled(
    stub: SteeringServiceStub, states: list[States], autoencoder: dict[str, Tensor]
) -> None:
    chosen = [7, 2]
    named = [{"autoencoder": "sae", "feature": feature} for feature in chosen]
    scores, result = detected(stub, detectors=["v"], features=named)
    columns = [(r.detector, r.feature if r.HasField("feature") else None, r.layer) for r in result.detectors]
    assert columns == [("v", None, 0)] * 3 + [("sae", 7, 0)] * 3 + [("sae", 2, 0)] * 3
    own = {name: tensor.double().numpy() for name, tensor in autoencoder.items()}
    active = 0
    for h, found in zip(states, scores, strict=True):
        p = (h[0] - own["decoder_bias"]) @ own["encoder"].T + own["encoder_bias"]
        f = np.where(p > own["threshold"], p, 0.0)[1:, chosen]
        kept = f[ordinary(h[0])]
        active += int((f > 0).sum())
        expected = np.stack([kept[-1], kept.mean(0), f.max(0)], axis=1).reshape(-1)
        assert found[3:] == pytest.approx(expected, abs=1e-4)
    assert active > 0


def test_layers_that_are_asked_for_leave_a_probe_whole(
    server: LiveServer, stub: SteeringServiceStub, states: list[States], autoencoder: dict[str, Tensor]
) -> None:
    x = np.concatenate([pooled(own, (0, 1), MEAN) for own in states])
    put_probe(server, "wide", LogisticRegression().fit(x, LABELS == 1), (0, 1), ["glad", "other"])
    _, result = detected(stub, detectors=["v", "wide"], layers=[0, 1], poolings=[MAX])
    assert [(r.detector, r.layer) for r in result.detectors] == [("v", 0), ("wide", 1)]
    with pytest.raises(grpc.RpcError) as refused:
        detected(stub, detectors=["v", "wide"], layers=[0])
    assert failure(refused.value).details["BadRequest"].field_violations[0].field == "detectors[1]"


@pytest.mark.parametrize(
    ("features", "field"),
    [
        ([{"autoencoder": "", "feature": 3}], "features[0].autoencoder"),
        ([{"autoencoder": "v", "feature": 3}], "features[0].autoencoder"),
        ([{"autoencoder": "topk", "feature": 3}], "features[0].autoencoder"),
        ([{"autoencoder": "sae", "feature": FEATURES}], "features[0].feature"),
        ([{"autoencoder": "sae", "feature": 1}, {"autoencoder": "sae", "feature": 1}], "features[1]"),
    ],
)
def test_features_that_cannot_be_read_are_refused_by_their_field(
    stub: SteeringServiceStub, autoencoder: dict[str, Tensor], features: list[dict[str, Any]], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        detected(stub, features=features)
    found = failure(refused.value)
    assert (found.code.name, found.details["BadRequest"].field_violations[0].field) == ("INVALID_ARGUMENT", field)
