"""The tensors of a GGUF file are checked against the parameters of its model: each needs the other, in one shape."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf_metadata import Metadata

SHOWN = 5
# The matrices of these architectures are stored [out, in] in the file and [in, out] in the model.
TRANSPOSED = frozenset({"gpt2"})


def check_tensors(metadata: Metadata, config: PreTrainedConfig) -> None:
    """Checks, before a weight is read, that no tensor is missing, unknown or of another shape; raises ModelSourceError.

    transformers would fill what is missing with random numbers, and drop what it does not know.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    processors: Any = TENSOR_PROCESSORS
    processor = processors.get(metadata.architecture, TensorProcessor)(config=config.to_dict())
    named: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
    there, path = metadata.tensors, metadata.path
    tied = {"output.weight"} if config.tie_word_embeddings else set()
    if missing := [name for name in named if name not in there and name not in tied]:
        raise ModelSourceError(f"{path} lacks {_shown(missing, 'tensor')} of a {type(model).__name__}")
    if unknown := [name for name in there if name not in named]:
        raise ModelSourceError(f"{path} has {_shown(unknown, 'tensor')} that a {type(model).__name__} does not use")
    for name in there:
        shape, wanted = metadata.shape(name), parameters[named[name]]
        if shape not in (wanted, wanted[::-1] if metadata.architecture in TRANSPOSED else wanted):
            raise ModelSourceError(f"{path}: tensor {name} has shape {list(shape)}, expected {list(wanted)}")


def _shown(names: list[str], noun: str) -> str:
    more = " …" if len(names) > SHOWN else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({', '.join(names[:SHOWN])}{more})"
