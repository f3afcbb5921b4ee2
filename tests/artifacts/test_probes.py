"""Stored probes: what they compute is what numpy and scikit-learn compute, and tensors that do not fit are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from patchclamp_server.artifacts.probes import Probe, check_probe, probe_of, stored_probe
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site

GENERATOR = np.random.default_rng(3)
STATES = {layer: GENERATOR.normal(2.0, 3.0, (40, 6)) for layer in (1, 4)}
SIDE_BY_SIDE = np.concatenate([STATES[1], STATES[4]], axis=1)
LABELS = np.arange(40) % 3
NAMES = {"site": "resid_post", "labels": ["a", "b", "c"], "target": "b"}
MEAN, SCALE = SIDE_BY_SIDE.mean(0), SIDE_BY_SIDE.std(0)
STANDARDISED = (SIDE_BY_SIDE - MEAN) / SCALE


def tensors(kind: str, matrix: np.ndarray[Any, Any], **others: Any) -> dict[str, Tensor]:
    """`matrix` [classes, both widths] of standardised inputs."""
    found = {name: torch.as_tensor(np.atleast_1d(values)) for name, values in others.items()}
    for i, layer in enumerate((1, 4)):
        own = slice(6 * i, 6 * i + 6)
        found[f"layer.{layer}.{kind}"] = torch.from_numpy(matrix[:, own].copy())
        found[f"layer.{layer}.mean"] = torch.from_numpy(MEAN[own].copy())
        found[f"layer.{layer}.scale"] = torch.from_numpy(SCALE[own].copy())
    return found


def probabilities(probe: Probe) -> np.ndarray[Any, Any]:
    return probe.probabilities(probe.scores(STATES))


def test_a_logistic_probe_of_two_layers_gives_the_probabilities_of_scikit_learn() -> None:
    fitted = LogisticRegression(C=0.3).fit(STANDARDISED, LABELS)
    stored = tensors("weight", fitted.coef_, bias=fitted.intercept_)
    check_probe(stored)
    found = probabilities(probe_of({**NAMES, "method": "logistic"}, stored))
    np.testing.assert_allclose(found, fitted.predict_proba(STANDARDISED), atol=1e-9)


def test_a_ridge_probe_gives_the_numbers_of_scikit_learn() -> None:
    fitted = Ridge(alpha=2.0).fit(STANDARDISED, LABELS)
    stored = tensors("weight", fitted.coef_[None], bias=fitted.intercept_)
    check_probe(stored)
    found = probabilities(probe_of({"method": "ridge", "site": "mlp_out"}, stored))
    np.testing.assert_allclose(found[:, 0], fitted.predict(STANDARDISED), atol=1e-9)


def test_a_prototype_probe_is_a_softmax_of_distances_and_prefers_the_nearest_centroid() -> None:
    fitted = NearestCentroid().fit(STANDARDISED, LABELS)
    stored = tensors("centres", fitted.centroids_, temperature=5.0)
    check_probe(stored)
    found = probabilities(probe_of({**NAMES, "method": "prototype"}, stored))
    distances = np.square(STANDARDISED[:, None] - fitted.centroids_).sum(2)
    np.testing.assert_allclose(found, softmax(-distances / 5.0, axis=1), atol=1e-9)
    assert found.argmax(1).tolist() == fitted.predict(STANDARDISED).tolist()


def test_calibration_moves_the_log_odds_of_the_target_and_leaves_the_proportions_of_the_others() -> None:
    fitted = LogisticRegression().fit(STANDARDISED, LABELS)
    stored = tensors("weight", fitted.coef_, bias=fitted.intercept_, calibration=[0.4, -0.7])
    found = probabilities(probe_of({**NAMES, "method": "logistic"}, stored))
    plain = fitted.predict_proba(STANDARDISED)
    wanted = expit(0.4 * np.log(plain[:, 1] / (1 - plain[:, 1])) - 0.7)
    np.testing.assert_allclose(found[:, 1], wanted, atol=1e-9)
    np.testing.assert_allclose(found[:, 0] / found[:, 2], plain[:, 0] / plain[:, 2], rtol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1.0)


@pytest.mark.parametrize("target", [0, 1])
def test_the_score_of_two_labels_is_the_calibrated_log_odds_of_the_target(target: int) -> None:
    weights = {layer: GENERATOR.normal(size=(2, 6)) for layer in (1, 4)}
    probe = Probe("logistic", Site.RESID_POST, weights, np.array([0.3, -0.1]), ("a", "b"), target, (0.7, 0.2))
    score = probe.target_score()
    assert score is not None
    total = score.bias + sum(STATES[layer] @ score.directions[layer] for layer in (1, 4))
    np.testing.assert_allclose(expit(total), probabilities(probe)[:, target], atol=1e-9)


def test_the_probability_of_one_of_three_labels_is_no_single_score() -> None:
    weights = {1: GENERATOR.normal(size=(3, 6))}
    assert Probe("logistic", Site.RESID_POST, weights, np.zeros(3), ("a", "b", "c")).target_score() is None


def test_a_probe_comes_back_from_the_store(tmp_path: Path) -> None:
    fitted = LogisticRegression().fit(STANDARDISED, LABELS)
    provenance = {**NAMES, "method": "logistic"}
    stored = tensors("weight", fitted.coef_, bias=fitted.intercept_)
    store = ArtifactStore(tmp_path)
    info = store.put(ArtifactKind.PROBE, stored, model_fingerprint="sha256:m", provenance=provenance)
    assert info.layers == (1, 4)
    probe = stored_probe(store.get(info.id))
    assert (probe.labels, probe.target, probe.layers) == (("a", "b", "c"), 1, (1, 4))
    np.testing.assert_allclose(probabilities(probe), fitted.predict_proba(STANDARDISED), atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer.1.weight": None}, "layer.1.weight"),
        ({"layer.4.mean": None}, "layer.4.mean is missing"),
        ({"layer.1.scale": torch.zeros(6)}, "layer.1.scale must be above 0"),
        ({"layer.4.weight": torch.zeros(2, 6)}, "layer.4.weight"),
        ({"layer.4.weight": torch.zeros(6)}, "dimension"),
        ({"bias": None}, "bias is missing"),
        ({"bias": torch.tensor([0.0, 1.0, torch.nan])}, "bias holds NaN"),
        ({"bias": torch.zeros(3, dtype=torch.int64)}, "bias is int64"),
        ({"calibration": torch.zeros(3)}, "calibration"),
        ({"temperature": torch.ones(1)}, "temperature does not belong"),
        ({"layer.01.weight": torch.zeros(3, 6)}, "is not a tensor of a probe"),
        ({"weights": torch.zeros(3, 6)}, "is not a tensor of a probe"),
    ],
)
def test_tensors_that_are_no_probe_are_refused_by_name(changed: dict[str, Tensor | None], message: str) -> None:
    stored = tensors("weight", np.ones((3, 12)), bias=np.zeros(3)) | changed
    with pytest.raises(InvalidArgument, match=message) as refused:
        check_probe({name: tensor for name, tensor in stored.items() if tensor is not None})
    assert refused.value.field == "tensors"


@pytest.mark.parametrize("changed", ["layer.1.scale", "calibration"])
def test_a_probe_that_reads_states_with_numbers_beyond_float32_is_refused(changed: str) -> None:
    """It would give a probability that is no number, and a watch could not hold it."""
    own = {"layer.1.scale": torch.full((6,), 1e-40), "calibration": torch.tensor([1e300, 0.0], dtype=torch.float64)}
    stored = tensors("weight", np.arange(24.0).reshape(2, 12), bias=np.zeros(2)) | {changed: own[changed]}
    check_probe(stored)
    with pytest.raises(InvalidArgument, match="beyond the largest float32") as refused:
        probe_of({"method": "logistic", "site": "resid_post", "labels": ["a", "b"], "target": "b"}, stored)
    assert refused.value.field == "tensors"


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"method": "lda"}, "provenance.method"),
        ({"method": "prototype"}, "provenance.method"),
        ({"method": "ridge"}, "provenance.method"),
        ({"site": "attn_q"}, "provenance.site"),
        ({"labels": ["a", "b"]}, "provenance.labels"),
        ({"labels": ["a", "b", "b"]}, "provenance.labels"),
        ({"labels": [1, 2, 3]}, "provenance.labels"),
        ({"target": "d"}, "provenance.target"),
    ],
)
def test_a_provenance_that_does_not_say_what_the_tensors_are_is_refused(said: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        probe_of({**NAMES, "method": "logistic", **said}, tensors("weight", np.ones((3, 12)), bias=np.zeros(3)))
    assert refused.value.field == field
