"""Labels of features as a JSON object, in UTF-8:

    {"<feature>": "label", ...}

Features are counted from 0 and may stand in any order. An empty label is none and is left out.
"""

import json
import re
from pathlib import Path

from patchclamp_server.artifacts.feature_labels import MAX_LABEL_BYTES, FeatureLabels, label_tensors
from patchclamp_server.artifacts.formats.base import ALONE, Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.json_object import json_object
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

FEATURE = re.compile(r"0|[1-9][0-9]{0,6}")
MAX_FILE_BYTES = 256 * 1024 * 1024


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns the tensors of feature_labels.py. MalformedFile names the feature that is wrong."""
    entries = json_object(source, "labels of features", '{"<feature>": "label"}', MAX_FILE_BYTES)
    labels: dict[int, str] = {}
    for name, label in entries.items():
        if FEATURE.fullmatch(name) is None:
            raise MalformedFile(f"{name!r:.80} is not a feature; expected a whole number")
        if not isinstance(label, str):
            raise MalformedFile(f"feature {name}: {label!r:.40} is not a text")
        if label:
            labels[int(name)] = label
    if not labels:
        raise MalformedFile("no feature has a label")
    try:
        tensors = label_tensors(labels)
    except UnicodeEncodeError as error:
        raise MalformedFile("a label is not valid Unicode") from error
    long = next((feature for feature, label in labels.items() if len(label.encode()) > MAX_LABEL_BYTES), None)
    if long is not None:
        raise MalformedFile(f"feature {long}: a label has at most {MAX_LABEL_BYTES} bytes")
    return Decoded(tensors, provenance={"method": "imported", "format": "feature_label_json"})


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Returns the labels, features ascending."""
    if artifact.info.kind is not ArtifactKind.FEATURE_LABELS:
        raise CannotExpress(f"a file of labels holds feature_labels, not a {artifact.info.kind.value}")
    return json.dumps({str(feature): label for feature, label in FeatureLabels(artifact)}, ensure_ascii=False).encode()
