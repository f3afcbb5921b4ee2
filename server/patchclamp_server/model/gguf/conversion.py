"""A GGUF file as safetensors with a tokenizer, its blocks in exact float32, as transformers reads it.

Models are not served from this: tests and benchmarks hold what is served against transformers' own model.
"""

from pathlib import Path
from typing import Any

import torch

from patchclamp_server.model.cache import cached_model
from patchclamp_server.model.digests import sha256_of_file
from patchclamp_server.model.end_tokens import gguf_end_token_ids
from patchclamp_server.model.errors import foreign_errors
from patchclamp_server.model.gguf.config import gguf_config
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.gguf.metadata import Metadata
from patchclamp_server.model.gguf.tokenizer import convert_tokenizer
from patchclamp_server.model.loaded import refuse_unloaded_by_transformers, without_load_report
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress

# This is part of an entry's key: raise it when the same file is to be converted differently.
CONVERSION = 6


def converted_gguf(path: Path, progress: Progress | None = None) -> Path:
    """Returns the directory with config, safetensors and tokenizer of a ``.gguf`` file, cached once it is converted.

    Raises ModelSourceError for a file that is not GGUF, or of a family that transformers cannot read.
    """
    progress = progress or Silent()
    size = path.stat().st_size
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress.update(Stage.VERIFY, done, size)

    key = f"gguf-{sha256_of_file(path, on_bytes)}-{CONVERSION}"
    return cached_model(key, lambda directory: _convert(path, directory, progress), progress)


def _convert(path: Path, directory: Path, progress: Progress) -> None:
    # This takes seconds to import, and models are served without it.
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    header = read_header(path)
    tokenizer = convert_tokenizer(header)
    with foreign_errors(f"{path} cannot be converted"):
        config = gguf_config(Metadata(header))
        with without_load_report(), transformers_progress(progress, Stage.CONVERT):
            # With output_loading_info this returns a pair, which its annotation does not know.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=CONFIG_MAPPING[config.model_type].from_dict(config.to_dict()),
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    model, loading = loaded
    refuse_unloaded_by_transformers(path, type(model).__name__, loading)
    if ends := gguf_end_token_ids(header.values):
        model.generation_config.eos_token_id = sorted(ends)
    with transformers_progress(progress, Stage.WRITE):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
