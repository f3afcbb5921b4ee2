"""A llama of the tests with neurons whose class is known, in its first layer, and texts that show it.

Every embedding has a one in dimension 0. Attention of layer 0 looks at all tokens alike, and writes how much of what it
saw was "s", which starts every text, and how much was "a". So signs of gates are those of what is written below,
whichever the scale that the norm gives them.
"""

from pathlib import Path

import torch
from tiny_llama import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

DEAD, ALWAYS, TOKEN, PAIR, POSITIONAL, RARE = range(6)
WINDOW = 32
EARLY = 8
# Dimensions of the residual stream.
_ONE, _START, _Q, _A, _B, _Z, _SEEN_START, _SEEN_A = range(8)
_MARKED = {"s": _START, "q": _Q, "a": _A, "b": _B, "z": _Z}


def save_planted_neurons(directory: Path) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
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
    with torch.no_grad():
        _plant(model, tokenizer.convert_tokens_to_ids(list(_MARKED)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _plant(model: LlamaForCausalLM, marked: list[int]) -> None:
    embedding = model.model.embed_tokens.weight
    embedding[:, : _SEEN_A + 1] = 0
    embedding[:, _ONE] = 1
    for token, dimension in zip(marked, _MARKED.values(), strict=True):
        embedding[token, dimension] = 1
    attention, gates = model.model.layers[0].self_attn, model.model.layers[0].mlp.gate_proj.weight
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight):
        weight.zero_()
    attention.v_proj.weight[0, _START] = 1
    attention.v_proj.weight[1, _A] = 1
    attention.o_proj.weight[_SEEN_START, 0] = 1
    attention.o_proj.weight[_SEEN_A, 1] = 1
    # What attention sees of the start, at its own position.
    first = float(1 / embedding[marked[0]].square().mean().sqrt())

    gates[: RARE + 1] = 0
    gates[DEAD, _ONE] = -1
    gates[ALWAYS, _ONE] = 1
    for neuron, dimension in ((TOKEN, _Q), (RARE, _Z)):
        gates[neuron, dimension], gates[neuron, _ONE] = 2, -1
    # "b", and "a" somewhere before it.
    gates[PAIR, _B], gates[PAIR, _SEEN_A], gates[PAIR, _ONE] = 100, 1, -100.01
    gates[POSITIONAL, _SEEN_START], gates[POSITIONAL, _ONE] = 1, -first / (EARLY + 0.5)


def planted_texts(n: int = 120) -> list[str]:
    """Of at most WINDOW bytes; "s" comes first and nowhere else, "a" before "b" alone, and "z" three times in all."""
    generator = torch.Generator().manual_seed(1)
    alphabet = "cdefghijklmnop "
    texts = []
    for i in range(n):
        length = int(torch.randint(24, WINDOW - 4, (), generator=generator))
        body = "".join(alphabet[int(k)] for k in torch.randint(len(alphabet), (length,), generator=generator))
        middle = ("ab", "b", "q")[i % 3] + ("z" if i in (7, 50, 91) else "")
        texts.append("s" + body[: length // 2] + middle + body[length // 2 :])
    return texts
