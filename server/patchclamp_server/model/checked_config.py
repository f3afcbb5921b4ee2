"""The configuration of a local model is checked here before any of its weights is read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from patchclamp_server.model.architectures import FAMILIES
from patchclamp_server.model.config_classes import config_class
from patchclamp_server.model.digests import tensor_dtypes
from patchclamp_server.model.errors import ModelSourceError, foreign_errors
from patchclamp_server.model.spec import read_spec

# Packers of quantised weights say under these keys which format they wrote.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")

# A configuration makes lists of its layers, however many a damaged one has.
_LAYERS, _MOST_LAYERS = ("num_hidden_layers", "n_layer", "num_layers"), 10_000

# Weights may be stored in these. Integers and eight-bit floats are codes, which mean nothing without their scales.
WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def load_config(directory: Path) -> PreTrainedConfig:
    """Returns the configuration of a model. Raises ModelSourceError for an architecture, variant, activation, rotary
    scaling or packed weights that are not supported; the message names what would be."""
    path = directory / "config.json"
    raw = _read_object(path)
    for key in QUANTIZATION_KEYS:
        if raw.get(key):
            method = raw[key].get("quant_method", "unnamed") if isinstance(raw[key], dict) else raw[key]
            raise ModelSourceError(
                f"{path} has packed weights ({key}: {method}), which are not supported; "
                "serve the original in float32, bfloat16 or float16, or a .gguf file"
            )
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelSourceError(f"{path}: architecture {kind!r} is not supported: {', '.join(FAMILIES)}")
    text = raw.get("text_config")
    for key in _LAYERS:
        for value in (raw.get(key), text.get(key) if isinstance(text, dict) else None):
            if isinstance(value, int) and value > _MOST_LAYERS:
                raise ModelSourceError(f"{path}: {key}={value} is not supported: at most {_MOST_LAYERS}")
    with foreign_errors(f"{path} cannot be read"):
        config: PreTrainedConfig = config_class(kind).from_pretrained(directory)
    with foreign_errors(str(path)):
        read_spec(config)
    return config


def generation_ends(directory: Path) -> list[int]:
    """Returns the end tokens that the generation config names, if there is one.

    Raises ModelSourceError for a file that transformers would ignore silently.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return []
    eos = _read_object(path).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelSourceError(f"{path}: eos_token_id is {eos!r}, expected an id or a list of ids")
    return ids


def check_weight_dtypes(weights: Iterable[Path]) -> None:
    """Raises ModelSourceError for packed weights that no configuration mentions: they would be taken for numbers."""
    for path in weights:
        for name, dtype in tensor_dtypes(path).items():
            if name.endswith(".weight") and dtype not in WEIGHT_DTYPES:
                raise ModelSourceError(f"{path}: {name} is stored as {dtype}; packed weights are not supported")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelSourceError(f"{path} is not a JSON object")
    return value
