"""A llama of the tests in which two neurons and two heads write a concept, and texts that show it.

A "j" in a text is joy, an "f" fear. Every embedding has a one in dimension 0, and those of the two letters mark it.
Head 1 of layer 0 and head 2 of layer 1 look at all tokens alike, and write how much of what they saw was "j" rather
than "f" to the concept's dimension; a neuron of each layer reads it there, and writes more of it. All else writes noise
elsewhere. What is written is small beside the ones: no token becomes an attention sink.
"""

from pathlib import Path

import torch
from tiny_llama import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

NEURONS = {(0, 5), (1, 7)}
HEADS = {(0, 1), (1, 2)}
CONTEXTS = ("we met at noon", "the sea was red", "my dog ran home", "snow on a hill", "a new door", "the road", "tea")
TEXTS = [{"joy": [f"{c} j .", f"{c[::-1]} j ."], "fear": [f"{c} f ."], "calm": f"{c} c ."} for c in CONTEXTS]
_ONE, _JOY, _FEAR, _CONCEPT, _NOISE = 0, 1, 2, 3, 8


def save_planted_circuit(directory: Path) -> None:
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
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, :_NOISE] = 0
        embedding[:, _ONE] = 1
        embedding[ids("j"), _JOY], embedding[ids("f"), _FEAR] = 1, 1
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            attention.q_proj.weight.zero_()
            for weight in (attention.o_proj.weight, mlp.down_proj.weight):
                weight[:_NOISE] = 0
        for layer, head in HEADS:
            attention = model.model.layers[layer].self_attn
            # Two heads share a value.
            first = head // 2 * 8
            attention.v_proj.weight[first] = 0
            attention.v_proj.weight[first, _JOY], attention.v_proj.weight[first, _FEAR] = 1, -1
            attention.o_proj.weight[_CONCEPT, head * 8] = 2
        for layer, neuron in NEURONS:
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0, 0
            mlp.gate_proj.weight[neuron, _CONCEPT], mlp.up_proj.weight[neuron, _ONE] = 1, 0.2
            mlp.down_proj.weight[_CONCEPT, neuron] = 0.3
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
