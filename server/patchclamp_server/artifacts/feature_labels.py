"""Names of features of an autoencoder, kept as bytes like a corpus.

    features  int64 [labels]     the numbers, ascending
    text      uint8 [bytes]      all labels one after the other, UTF-8
    ends      int64 [labels]     where each ends: label i is text[ends[i - 1] : ends[i]], the first from 0 on

The id of the autoencoder is in `provenance["autoencoder"]`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoder_spec import MAX_FEATURES
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument

TENSORS = {"features": torch.int64, "text": torch.uint8, "ends": torch.int64}
MAX_LABEL_BYTES = 4096


def label_tensors(labels: Mapping[int, str]) -> dict[str, Tensor]:
    """Returns what is stored of labels by feature, at least one. ValueError: text that is not valid Unicode."""
    features = sorted(labels)
    texts = [labels[feature].encode() for feature in features]
    return {
        "features": torch.tensor(features, dtype=torch.int64),
        "text": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),
        "ends": torch.from_numpy(np.cumsum([len(text) for text in texts], dtype=np.int64)),
    }


class FeatureLabels:
    """Labels of a stored artifact, decoded one at a time. FailedPrecondition: another kind of artifact."""

    def __init__(self, artifact: Artifact) -> None:
        if artifact.info.kind is not ArtifactKind.FEATURE_LABELS:
            raise FailedPrecondition("", f"{artifact.info.id} is a {artifact.info.kind.value}, not feature_labels")
        self.autoencoder: str = artifact.info.provenance["autoencoder"]
        self._features, self._text, self._ends = (artifact.tensors[name].numpy() for name in TENSORS)

    def of(self, features: Sequence[int]) -> list[str]:
        """Returns the label of each, "" where it has none."""
        places = np.searchsorted(self._features, features)
        return [
            self._label(place) if place < len(self._features) and self._features[place] == feature else ""
            for feature, place in zip(features, places.tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((int(feature), self._label(place)) for place, feature in enumerate(self._features))

    def _label(self, place: int) -> str:
        start = int(self._ends[place - 1]) if place else 0
        return self._text[start : int(self._ends[place])].tobytes().decode()


def label_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """None. InvalidArgument: names and shapes that labels do not have."""
    if set(shapes) != set(TENSORS):
        raise InvalidArgument("tensors", f"feature_labels have {', '.join(TENSORS)}, not {', '.join(shapes)[:200]}")
    for name, shape in shapes.items():
        if len(shape) != 1 or not shape[0]:
            raise InvalidArgument("tensors", f"{name} must be [n] with n >= 1, not {list(shape)}")
    if shapes["features"] != shapes["ends"]:
        raise InvalidArgument("tensors", f"{shapes['features'][0]} features and {shapes['ends'][0]} ends of labels")
    return ()


def check_labels_of_features(tensors: Mapping[str, Tensor]) -> None:
    """Types, order, bounds, and that each label is UTF-8. InvalidArgument names the feature."""
    for name, dtype in TENSORS.items():
        if tensors[name].dtype != dtype:
            found = str(tensors[name].dtype).removeprefix("torch.")
            raise InvalidArgument("tensors", f"{name} must be {str(dtype).removeprefix('torch.')}, not {found}")
    features, text, ends = (tensors[name].numpy() for name in TENSORS)
    if features[0] < 0 or features[-1] >= MAX_FEATURES or bool((features[1:] <= features[:-1]).any()):
        raise InvalidArgument("tensors", f"features must ascend, from 0 to {MAX_FEATURES - 1}, each once")
    starts = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1]))
    # Compared and not subtracted, which numbers near the ends of int64 would make wrong.
    bad = np.flatnonzero((ends <= starts) | (ends > len(text)))
    if len(bad):
        raise InvalidArgument(
            "tensors", f"ends: the label of feature {features[bad[0]]} has no byte, or more than text"
        )
    if ends[-1] != len(text):
        raise InvalidArgument("tensors", f"ends: the last is {ends[-1]}, and text has {len(text)} bytes")
    long = np.flatnonzero(ends - starts > MAX_LABEL_BYTES)
    if len(long):
        raise InvalidArgument(
            "tensors", f"the label of feature {features[long[0]]} has more than {MAX_LABEL_BYTES} bytes"
        )
    for feature, start, end in zip(features.tolist(), starts.tolist(), ends.tolist(), strict=True):
        try:
            text[start:end].tobytes().decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument("tensors", f"the label of feature {feature} is not UTF-8") from error


def check_about(provenance: Mapping[str, Any]) -> None:
    """InvalidArgument on "provenance.autoencoder"."""
    autoencoder = provenance.get("autoencoder")
    if not isinstance(autoencoder, str) or not autoencoder.startswith("sha256:"):
        raise InvalidArgument("provenance.autoencoder", "feature_labels need the id of their autoencoder")
