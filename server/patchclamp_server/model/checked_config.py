"""The configuration of a local model, checked before any of its weights is read."""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from patchclamp_server.model.architectures import FAMILIES
from patchclamp_server.model.errors import ModelSourceError, foreign_errors
from patchclamp_server.model.spec import read_spec

# Where packers of quantised weights say which format they wrote.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def load_config(directory: Path) -> PreTrainedConfig:
    """Raises ModelSourceError for what is not supported: architecture, variant, activation, rotary scaling, packed
    weights. The message names what would be."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ModelSourceError(f"{path} is not a JSON object")
    for key in QUANTIZATION_KEYS:
        if raw.get(key):
            method = raw[key].get("quant_method", "unnamed") if isinstance(raw[key], dict) else raw[key]
            raise ModelSourceError(
                f"{path} has packed weights ({key}: {method}), which are not supported; "
                "serve the original in float32, bfloat16 or float16, or a .gguf file"
            )
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ModelSourceError(f"{path}: architecture {kind!r} is not supported: {', '.join(FAMILIES)}")
    with foreign_errors(f"{path} cannot be read"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with foreign_errors(str(path)):
        read_spec(config)
    return config
