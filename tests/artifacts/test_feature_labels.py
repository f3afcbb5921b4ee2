"""Names of features: by number, wherever they stand among those that have one."""

from pathlib import Path

import pytest

from patchclamp_server.artifacts.feature_labels import FeatureLabels, label_tensors
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind


@pytest.fixture
def labels(tmp_path: Path) -> FeatureLabels:
    store = ArtifactStore(tmp_path)
    info = store.put(
        ArtifactKind.FEATURE_LABELS,
        label_tensors({7: "sieben", 3: "drei ✓", 200: "z"}),
        model_fingerprint="m",
        provenance={"autoencoder": "sha256:" + "0" * 64},
    )
    return FeatureLabels(store.get(info.id))


def test_labels_come_back_by_their_features_in_ascending_order(labels: FeatureLabels) -> None:
    assert list(labels) == [(3, "drei ✓"), (7, "sieben"), (200, "z")]


def test_a_feature_without_a_label_has_none(labels: FeatureLabels) -> None:
    assert labels.of([200, 0, 7, 4, 201, 3]) == ["z", "", "sieben", "", "", "drei ✓"]
