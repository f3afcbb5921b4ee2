"""A checkpoint is a model as its files hold it: checked whole, and nothing of its weights read yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patchclamp_server.model.checked_config import check_weight_dtypes, generation_ends, load_config
from patchclamp_server.model.end_tokens import end_token_ids, gguf_end_token_ids
from patchclamp_server.model.errors import foreign_errors
from patchclamp_server.model.file_tensors import FileTensors
from patchclamp_server.model.fingerprint import gguf_fingerprint, model_fingerprint
from patchclamp_server.model.gguf.config import gguf_config
from patchclamp_server.model.gguf.files import read_headers
from patchclamp_server.model.gguf.metadata import Metadata
from patchclamp_server.model.gguf.tokenizer import gguf_tokenizer
from patchclamp_server.model.gguf.vocabulary import check_vocabulary
from patchclamp_server.model.parameters import parameters_of
from patchclamp_server.model.progress import Progress
from patchclamp_server.model.safetensors_files import map_safetensors
from patchclamp_server.model.source import ModelSource, weight_files
from patchclamp_server.model.spec import read_spec
from patchclamp_server.model.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`fingerprint` is computed when it is called, which may read all files."""

    path: Path
    config: PreTrainedConfig
    tensors: FileTensors
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    fingerprint: Callable[[], str]


def open_checkpoint(source: ModelSource, progress: Progress) -> Checkpoint:
    """Opens a directory of safetensors or the files of a GGUF model.

    Raises ModelSourceError for all that is wrong with a model that can be known without its weights.
    """
    return _gguf(source.gguf_files, progress) if source.gguf_files else _directory(source.path, progress)


def _directory(directory: Path, progress: Progress) -> Checkpoint:
    config = load_config(directory)
    ends = generation_ends(directory)
    files = weight_files(directory)
    check_weight_dtypes(files)
    tokenizer = load_tokenizer(directory)
    with foreign_errors(f"{directory} cannot be loaded"):
        tensors = map_safetensors(directory, files, parameters_of(config, read_spec(config)))
    eos = end_token_ids(config, tokenizer, ends)
    return Checkpoint(directory, config, tensors, tokenizer, eos, lambda: model_fingerprint(directory, progress))


def _gguf(files: Sequence[Path], progress: Progress) -> Checkpoint:
    # This needs a package that machines which serve other models may not have.
    from patchclamp_server.model.gguf.tensors import map_gguf

    path = files[0]
    with foreign_errors(f"{path} cannot be loaded"):
        header = read_headers(files)
        metadata = Metadata(header)
        config = gguf_config(metadata)
        check_vocabulary(header)
        tensors = map_gguf(metadata, config, parameters_of(config, read_spec(config)))
        ends = gguf_end_token_ids(header.values)
    tokenizer = gguf_tokenizer(header, progress)
    eos = end_token_ids(config, tokenizer, ends)
    return Checkpoint(path, config, tensors, tokenizer, eos, lambda: gguf_fingerprint(header, files, progress))
