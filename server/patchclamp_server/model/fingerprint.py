"""A fingerprint identifies a model by what decides its activations and its token ids' meaning, and only that."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

from patchclamp_server.model.digests import (
    OnBytes,
    Parts,
    digest_of_parts,
    sha256_of_file,
    span_digests,
    tensor_digests,
)
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import Header
from patchclamp_server.model.progress import Progress, Stage
from patchclamp_server.model.quantization.scheme import REVISION, Scheme
from patchclamp_server.model.source import weight_files

# These keys of config.json do not change what the model computes: paths, versions, the dtype that its tensors carry
# anyway, and options of transformers' outputs. Keys that begin with an underscore are bookkeeping of transformers.
NOT_COMPUTATION = frozenset(
    {
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "task_specific_params",
        "auto_map",
    }
)
# These are read only where there is no tokenizer.json.
OTHER_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def model_fingerprint(directory: Path, progress: Progress | None = None) -> str:
    """Returns the hexadecimal SHA-256 over config, tokenizer and the name, dtype, shape and bytes of every tensor.

    It does not depend on paths, file times, library versions, sharding or JSON formatting. The tensors are read once
    and their digests remembered by path, size and modification time.
    """
    weights = weight_files(directory)
    on_bytes = _reading(weights, progress)
    tensors: Parts = {}
    for path in weights:
        tensors |= tensor_digests(path, on_bytes)
    parts = {
        "config": _canonical_digest(_computation(_read_json(directory / "config.json"))),
        "tensors": digest_of_parts(tensors),
        "tokenizer": _tokenizer_digest(directory),
    }
    return digest_of_parts(parts)


def gguf_fingerprint(header: Header, files: Sequence[Path], progress: Progress | None = None) -> str:
    """Returns the SHA-256 over the keys of architecture and vocabulary and the name, format, shape and bytes of every
    tensor, with the formats of the matrices behind it, the one with the most bytes first: ``<hex>-gguf-Q4_K+Q6_K``.

    It does not depend on paths, names, chat templates, or on whether the file is split. Weights of another format are
    another model: their activations differ.
    """
    # Machines that serve other models may not have this.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    architecture = header.values.get("general.architecture")
    wanted = ("general.architecture", f"{architecture}.", "tokenizer.ggml.")
    keys = {key: value for key, value in header.values.items() if key.startswith(wanted)}
    sizes, formats, told = {}, Counter[str](), {}
    for name, entry in header.entries.items():
        kind = GGMLQuantizationType(entry.format)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        sizes[name] = prod(entry.shape) // block * block_bytes
        told[name] = f"{kind.name} {list(entry.shape)}"
        if len(entry.shape) > 1:
            formats[kind.name] += sizes[name]
    on_bytes = _reading(files, progress)
    tensors: Parts = {}
    for path in files:
        own = {name: (e.offset, sizes[name]) for name, e in header.entries.items() if e.file == path}
        digests = span_digests(path, own, on_bytes)
        tensors |= {name: f"{told[name]} {digest}" for name, digest in digests.items()}
    digest = digest_of_parts({"keys": _canonical_digest(keys), "tensors": digest_of_parts(tensors)})
    return f"{digest}-gguf-{'+'.join(name for name, _ in formats.most_common())}"


def _reading(files: Iterable[Path], progress: Progress | None) -> OnBytes:
    """Returns what is to be told how many bytes of the files were read."""
    total = sum(path.stat().st_size for path in files)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress.update(Stage.FINGERPRINT, done, total)

    return on_bytes


def quantized_fingerprint(fingerprint: str, scheme: Scheme) -> str:
    """Returns the fingerprint of a model with `fingerprint` whose weights are quantised by `scheme` when they load."""
    return f"{fingerprint}-quantized-{scheme.name}-{REVISION}"


def _computation(value: Any) -> Any:
    """Returns `value` without the keys that do not define the computation, at any depth (multimodal configs nest)."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in NOT_COMPUTATION and not key.startswith("_")}
        return {key: _computation(item) for key, item in kept.items()}
    return value


def _tokenizer_digest(directory: Path) -> str:
    if (directory / "tokenizer.json").is_file():
        return _canonical_digest(_read_json(directory / "tokenizer.json"))
    files = [directory / name for name in OTHER_TOKENIZER_FILES if (directory / name).is_file()]
    if not files:
        raise ModelSourceError(f"{directory} has no tokenizer: neither tokenizer.json nor {OTHER_TOKENIZER_FILES}")
    return digest_of_parts({path.name: sha256_of_file(path) for path in files})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{path} cannot be read as JSON: {error}") from error


def _canonical_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
