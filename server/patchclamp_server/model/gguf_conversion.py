"""A GGUF file is converted to safetensors with a tokenizer once; its quantised blocks become exact float32."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from patchclamp_server.model.cache import cached_model
from patchclamp_server.model.digests import sha256_of_file
from patchclamp_server.model.end_tokens import gguf_end_token_ids
from patchclamp_server.model.errors import ModelSourceError, foreign_errors
from patchclamp_server.model.gguf_config import gguf_config
from patchclamp_server.model.gguf_metadata import Metadata
from patchclamp_server.model.gguf_tensors import check_tensors
from patchclamp_server.model.loaded import refuse_unloaded, without_load_report
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress
from patchclamp_server.model.spec import read_spec

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

# This is part of an entry's key: raise it when the same file is to be converted differently.
CONVERSION = 6

# `tokenizer.ggml.pre` (names of llama.cpp) says how a byte-level vocabulary splits text before its merges apply.
# transformers splits by the regular expression of the names that it knows, and as GPT-2 otherwise. These split digits
# apart as well, which transformers leaves out.
DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "dolma", "jina-es", "jina-de", "trillion"})


def conversion_key(sha256: str) -> str:
    return f"gguf-{sha256}-{CONVERSION}"


def converted_gguf(path: Path, progress: Progress | None = None) -> Path:
    """Returns the directory with safetensors and tokenizer of a ``.gguf`` file, which is cached once it is converted.

    Raises ModelSourceError when it is not a GGUF file, or is of a family that transformers cannot read.
    """
    progress = progress or Silent()
    size = path.stat().st_size
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress.update(Stage.VERIFY, done, size)

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelSourceError(f"{path} is not a GGUF file")
    key = conversion_key(sha256_of_file(path, on_bytes))
    return cached_model(key, lambda directory: convert(path, directory, progress), progress)


def convert(path: Path, directory: Path, progress: Progress) -> None:
    """Writes config, float32 weights and tokenizer of the file into `directory`.

    Raises ModelSourceError, before a weight is read, for a file that is not supported or not whole.
    """
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # The file is read whole before transformers does, which does not say what is wrong with a damaged file.
    try:
        # Only a GGUF file needs its reader, and machines that serve other models may not have it.
        from gguf import GGUFReader

        header = GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelSourceError(f"{path} is not a whole GGUF file: {error}") from error
    metadata = Metadata(str(path), header)
    with foreign_errors(f"{path} cannot be converted"):
        config = gguf_config(metadata)
        read_spec(config)
        check_tensors(metadata, config)
        tokenizer = AutoTokenizer.from_pretrained(**location)
        _restore_digit_splitting(tokenizer, header, path.name)
        with without_load_report(), transformers_progress(progress, Stage.CONVERT):
            # With output_loading_info this returns a pair, which its annotation does not know.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **location,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    model, loading = loaded
    refuse_unloaded(path, model, loading)
    if ends := gguf_end_token_ids(header):
        model.generation_config.eos_token_id = sorted(ends)
    with transformers_progress(progress, Stage.WRITE):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase, header: "GGUFReader", file_name: str) -> None:
    field = header.fields.get("tokenizer.ggml.pre")
    if field is None:
        return
    name = field.contents()
    backend = tokenizer.backend_tokenizer
    if name in DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in AS_GPT2:
        logger.warning("%s: pre-tokenizer %r is not known; text is split as GPT-2 does", file_name, name)
