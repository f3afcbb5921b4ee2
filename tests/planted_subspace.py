"""A llama of the tests whose blocks do nothing, with a variable in one direction and a cycle in one plane.

Every capital carries a sign along dimension 0, plus for every other one, and the model answers "+" or "-" by it. The
digits 0 to 6 lie in a circle in dimensions 1 and 2, and the model answers "a" to "g" by their angles. All else in the
embeddings is noise, which no answer depends on but by the norm.
"""

import math
from pathlib import Path

import torch
from tiny_llama import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 32
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWX"
PLUS, MINUS = CAPITALS[::2], CAPITALS[1::2]
DIGITS, LETTERS = "0123456", "abcdefg"
# Away from the origin, so that a rotation about 0 is another than that about the centre of the circle.
CENTRE = torch.zeros(WIDTH)
CENTRE[1], CENTRE[3] = 0.5, 1.0


def save_planted_subspace(directory: Path) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        noise = 0.3 * torch.randn(len(tokenizer), WIDTH)
    noise[:, :3] = 0
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(noise)
        unembedding.zero_()
        for letter in CAPITALS:
            embedding[ids(letter), 0] = 1.5 if letter in PLUS else -1.5
        unembedding[ids("+"), 0], unembedding[ids("-"), 0] = 3, -3
        for value, (digit, letter) in enumerate(zip(DIGITS, LETTERS, strict=True)):
            angle = 2 * math.pi * value / len(DIGITS)
            circle = torch.tensor([math.cos(angle), math.sin(angle)])
            embedding[ids(digit)] = 0.1 * embedding[ids(digit)] + CENTRE
            embedding[ids(digit), 1:3] += 1.5 * circle
            unembedding[ids(letter), 1:3] = 4 * circle
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
