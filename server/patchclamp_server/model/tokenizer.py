"""This loads the tokenizer of a model's directory, and chooses which of its templates renders a chat."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchclamp_server.model.errors import ModelSourceError, foreign_errors


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer without running code of its repository. ModelSourceError: its files make no tokenizer."""
    with foreign_errors(f"the tokenizer of {directory} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if tokenizer.vocab_size == 0:
            raise ModelSourceError(f"the tokenizer of {directory} has no vocabulary")
    return tokenizer


DEFAULT_TEMPLATE = "default"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the template, or the default of several named ones; None where a chat alone chooses none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(DEFAULT_TEMPLATE)
    return template or None
