"""The tokenizer of a model's directory."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchclamp_server.model.errors import ModelSourceError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """No code of the repository runs. Raises ModelSourceError where its files make no tokenizer."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # What is wrong with tokenizer.json, the Rust library says with a bare Exception, and its readers with all kinds.
    except Exception as error:
        raise ModelSourceError(
            f"the tokenizer of {directory} cannot be read: {error or type(error).__name__}"
        ) from error
    return tokenizer
