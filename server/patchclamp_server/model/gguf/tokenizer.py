"""The tokenizer of a GGUF file, which transformers makes of its keys; that takes seconds, so it is made once."""

import logging
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchclamp_server.model.cache import CacheUnwritable, cached_model
from patchclamp_server.model.errors import foreign_errors
from patchclamp_server.model.gguf.header import Header
from patchclamp_server.model.progress import Progress, Stage
from patchclamp_server.model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# This is part of an entry's key: raise it when the same keys are to make another tokenizer.
VERSION = 2

# `tokenizer.ggml.pre` (names of llama.cpp) says how a byte-level vocabulary splits text before its merges apply.
# transformers splits by the regular expression of the names that it knows, and as GPT-2 otherwise. These split digits
# apart as well, which transformers leaves out.
DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "dolma", "jina-es", "jina-de", "trillion"})


def gguf_tokenizer(header: Header, progress: Progress) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, from the cache where the same keys made one. Raises ModelSourceError: they make none."""

    def build(directory: Path) -> None:
        progress.update(Stage.TOKENIZER)
        convert_tokenizer(header).save_pretrained(directory)

    key = f"tokenizer-{sha256(header.metadata.data).hexdigest()}-{VERSION}"
    try:
        return load_tokenizer(cached_model(key, build, progress))
    except CacheUnwritable as error:
        logger.warning("the tokenizer of %s is made at every start: %s", header.path, error)
        with tempfile.TemporaryDirectory() as directory:
            build(Path(directory))
            return load_tokenizer(Path(directory))


def convert_tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """Makes the tokenizer of the file alone. Raises ModelSourceError where transformers cannot."""
    with (
        foreign_errors(f"the tokenizer of {header.path} cannot be loaded"),
        # transformers would read the tokenizer files of another model that lie beside it, and ask to run their code.
        tempfile.TemporaryDirectory() as directory,
    ):
        alone = Path(directory) / "model.gguf"
        alone.symlink_to(header.path.resolve())
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, gguf_file=alone.name, trust_remote_code=False
        )
        _restore_digit_splitting(tokenizer, header)
    return tokenizer


def _restore_digit_splitting(tokenizer: PreTrainedTokenizerBase, header: Header) -> None:
    name = header.values.get("tokenizer.ggml.pre")
    if name is None:
        return
    backend: Any = tokenizer
    backend = backend.backend_tokenizer
    if name in DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in AS_GPT2:
        logger.warning("%s: pre-tokenizer %r is not known; text is split as GPT-2 does", header.path.name, name)
