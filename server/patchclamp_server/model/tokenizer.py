"""The tokenizer of a model's directory."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchclamp_server.model.errors import ModelSourceError, foreign_errors


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """No code of the repository runs. Raises ModelSourceError where its files make no tokenizer."""
    with foreign_errors(f"the tokenizer of {directory} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if tokenizer.vocab_size == 0:
            raise ModelSourceError(f"the tokenizer of {directory} has no vocabulary")
    return tokenizer


DEFAULT_TEMPLATE = "default"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Its template, or of several named ones the default; None where a chat without further words chooses none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(DEFAULT_TEMPLATE)
    return template or None
