"""Every key of the architecture in a GGUF file's metadata must be used, or be known to change nothing."""

from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import Header
from patchclamp_server.model.gguf.vocabulary import SPECIAL_TOKEN

# These keys do not change what the model computes: how its vectors would be pooled, the layout its file once had,
# whether a scaling was trained, and counts of labels that no causal LM has.
IRRELEVANT = frozenset({"pooling_type", "tensor_data_layout", "rope.scaling.finetuned", "classifier.output_labels"})
# These keys change nothing at these values. At any other value the model is one that is not known here.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    # In YaRN this is how much of it is mixed in; a negative value means "as usual", all of it.
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


class Metadata:
    """Holds the keys below the architecture, without its name; `refuse_rest` refuses those that were never taken."""

    def __init__(self, header: Header) -> None:
        self.path = str(header.path)
        values = header.values
        if "general.architecture" not in values:
            raise ModelSourceError(f"{self.path} names no general.architecture")
        self.architecture = str(values["general.architecture"])
        prefix = f"{self.architecture}."
        self._values = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        # These are ids by name: bos, eos, eot, padding, ...
        self.special_tokens: dict[str, int] = {
            match[1]: value for key, value in values.items() if (match := SPECIAL_TOKEN.fullmatch(key))
        }
        tokens = values.get("tokenizer.ggml.tokens")
        self.n_tokens = len(tokens) if isinstance(tokens, list) else 0
        self.entries = dict(header.entries)

    def take(self, key: str, default: Any = None) -> Any:
        """Takes the value of a key; a value that is given for each layer must be the same for all. Raises
        ModelSourceError for one that differs, and for NaN and infinity."""
        value = self._values.pop(key, default)
        if any(isinstance(one, float) and not isfinite(one) for one in _listed(value)):
            raise self.refusal(key, f"{value} is not supported: a finite number")
        if isinstance(value, list):
            if len({*value}) != 1:
                raise self.refusal(key, f"{value} differs between layers, which is not supported")
            value = value[0]
        return value

    def take_list(self, key: str) -> Any:
        """Takes the value of a key as it is: a number for all layers, a list with one for each, or None."""
        return self._values.pop(key, None)

    def need(self, key: str) -> Any:
        value = self.take(key)
        if value is None:
            raise ModelSourceError(f"{self.path} lacks the key {self.architecture}.{key}, which its family needs")
        return value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns the shape of a tensor: [rows, columns]."""
        return self.entries[tensor].shape

    def floats(self, tensor: str) -> NDArray[np.float32]:
        """Returns a small tensor of float32."""
        entry = self.entries[tensor]
        if entry.format != Format.F32:
            raise ModelSourceError(
                f"{self.path}: {tensor} is of format {entry.format}, expected {Format.F32} (float32)"
            )
        size = prod(entry.shape) * Format.F32.size
        if size > len(entry.memory):
            raise ModelSourceError(f"{self.path} is not a whole GGUF file: {tensor} is cut off")
        return entry.memory[:size].copy().view(np.float32)

    def refuse_rest(self) -> None:
        """Raises ModelSourceError for keys that are left and could change what the model computes."""
        for key, value in self._values.items():
            if key in IRRELEVANT or value in NEUTRAL.get(key, ()):
                continue
            shown = value if not isinstance(value, list) or len(value) <= 8 else f"a list of {len(value)}"
            raise self.refusal(key, f"{shown} is not supported; served without it, the model would be another one")

    def refusal(self, key: str, why: str) -> ModelSourceError:
        return ModelSourceError(f"{self.path}: {self.architecture}.{key} = {why}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
