"""Which chat template of a tokenizer renders a chat."""

from transformers import PreTrainedTokenizerBase

DEFAULT = "default"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Its template, or of several named ones the default; None where a chat without further words chooses none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(DEFAULT)
    return template or None
