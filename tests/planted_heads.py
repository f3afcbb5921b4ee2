"""A GPT-2 of two layers of two heads whose weights are written by hand: each head but one does one thing and no other.

    layer 0 head 0   attends to the token before, and writes which it is
    layer 1 head 0   attends to where the token before is the current one: induction
    layer 1 head 1   writes the successor of a day or month

The residual stream has a coordinate for each token, for each position, and for each token that may stand before.
"""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.weights import decoder_from_transformers

PREVIOUS_TOKEN, INDUCTION, SUCCESSOR = (0, 0), (1, 0), (1, 1)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
BOS, UNKNOWN = 0, 1
WORDS = ["<bos>", "<unknown>", *DAYS, *MONTHS, *(f"word{i}" for i in range(19))]
VOCAB, POSITIONS, HEAD = 40, 48, 64
# Large enough that the weight of the second best key vanishes in float32.
SHARP = 20.0
assert len(WORDS) == VOCAB


@cache
def planted_model() -> GPT2LMHeadModel:
    """With eager attention; the same object at every call."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=2 * HEAD,
        n_inner=VOCAB,
        n_layer=2,
        n_head=2,
        bos_token_id=BOS,
        eos_token_id=BOS,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config)
    model.train(False)
    token, position, before = range(VOCAB), range(VOCAB, VOCAB + POSITIONS), range(VOCAB + POSITIONS, 2 * HEAD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("ln_" in name and name.endswith("weight")))
        transformer = model.transformer
        transformer.wte.weight[:, token] = torch.eye(VOCAB)
        transformer.wpe.weight[:, position] = torch.eye(POSITIONS)
        first, second = transformer.h
        queries, keys, values = (first.attn.c_attn.weight[:, i * 2 * HEAD :] for i in range(3))
        _connect(queries, position, 0, SHARP)
        _connect(keys, position[:-1], 1)
        _connect(values, token, 0)
        _connect(first.attn.c_proj.weight[:VOCAB].T, before, 0)
        # The first MLP adds to the coordinate of the token, which the successor head reads.
        _connect(first.mlp.c_fc.weight, token, 0)
        _connect(first.mlp.c_proj.weight, range(VOCAB), 0, 0.1)
        queries, keys, values = (second.attn.c_attn.weight[:, i * 2 * HEAD :] for i in range(3))
        _connect(queries, token, 0, SHARP)
        _connect(keys, before, 0)
        _connect(values, token, HEAD)
        for words in (DAYS, MONTHS):
            for word, successor in zip(words, words[1:] + words[:1], strict=True):
                second.attn.c_proj.weight[HEAD + WORDS.index(word), WORDS.index(successor)] = 1.0
    return model


def _connect(weight: Tensor, inputs: range, first_output: int, strength: float = 1.0) -> None:
    """Input i of `inputs` to output first_output + i, in a matrix [in, out]."""
    for i, row in enumerate(inputs):
        weight[row, first_output + i] = strength


@cache
def planted() -> LoadedModel:
    decoder = decoder_from_transformers(planted_model(), dtype=torch.float32, device="cpu")
    spec = decoder.spec
    info = ModelInfo(
        name="planted heads",
        fingerprint="sha256:" + "0" * 64,
        architecture=spec.architecture,
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype="float32",
        device="cpu",
        sites=dict(spec.sites),
    )
    return LoadedModel(info, decoder, planted_tokenizer(), eos_token_ids=frozenset({BOS}))


def planted_tokenizer(absent: str = "") -> PreTrainedTokenizerFast:
    """One word a token, a BOS before every text, and no word with a space before it."""
    vocabulary = {word: index for index, word in enumerate(WORDS) if word != absent}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unknown>"))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", unk_token="<unknown>")  # type: ignore[no-untyped-call]
