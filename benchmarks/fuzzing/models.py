"""Random models: the tiny llama with another tokenizer, more or fewer rows than it has tokens, another template."""

from pathlib import Path
from random import Random

import torch
from text_tokenizers import KINDS, tokenizer
from tiny_llama import save_tiny_llama
from transformers import AutoConfig, LlamaForCausalLM

from fuzzing.templates import chat_template


def save_random_model(directory: Path, random: Random) -> str:
    """Saves it, and says what it is."""
    save_tiny_llama(directory)
    kind = random.choice(sorted(KINDS))
    own = tokenizer(kind)
    rows = max(8, len(own) + random.choice((0, 64, -1, -40, -len(own) + 16)))
    config = AutoConfig.from_pretrained(directory)
    config.vocab_size = rows
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    own.save_pretrained(directory)
    template = chat_template(random)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return f"{kind}, {rows} rows for {len(own)} tokens, template {template!r}"
