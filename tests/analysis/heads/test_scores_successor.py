"""Successor scores: which tokens compete, and what the circuit of a head is, against a naive one from transformers."""

import pytest
import torch
from engine_runs import loaded
from planted_heads import DAYS, MONTHS, WORDS, planted, planted_tokenizer
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from patchclamp_server.analysis.heads.scores.ordinals import TokenSequence, ordinals, token_sequences
from patchclamp_server.analysis.heads.scores.successor import OvCircuit
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.prompt import PromptEncoder

TOKENS = TokenSequence("seven tokens", tuple((i, i + 1) for i in range(3, 9)), tuple(range(3, 10)))


def sequences(model: LoadedModel) -> list[TokenSequence]:
    return token_sequences(PromptEncoder(model.tokenizer, model.info))


def test_days_months_numbers_and_letters_are_there() -> None:
    by_name = {ordinal.name: ordinal for ordinal in ordinals()}
    assert {"days", "months", "numbers", "letters"} <= set(by_name)
    assert [len(by_name[name].words) for name in ("days", "months", "letters")] == [7, 12, 26]
    assert by_name["days"].cyclic
    assert not by_name["letters"].cyclic


def test_a_spelling_counts_where_the_tokenizer_has_whole_tokens() -> None:
    found = {s.name: s for s in sequences(planted())}
    # Neither in lower case nor after a space; and of the short names it has May alone.
    assert set(found) == {"days, capital", "months, capital"}
    assert [WORDS[token] for token in found["days, capital"].members] == DAYS


def test_an_unknown_word_takes_no_part() -> None:
    tokenizer = planted_tokenizer(absent="Wednesday")
    days, _ = token_sequences(PromptEncoder(tokenizer, planted().info))
    assert [WORDS[a] for a, _ in days.pairs] == ["Monday", "Thursday", "Friday", "Saturday", "Sunday"]
    assert len(days.members) == 6


def test_a_cyclic_sequence_wraps_around() -> None:
    _, months = sequences(planted())
    assert (WORDS.index(MONTHS[-1]), WORDS.index(MONTHS[0])) in months.pairs
    assert len(months.pairs) == 12


def test_a_sequence_that_ends_has_no_successor_of_its_last_token(tiny_llama: LoadedModel) -> None:
    letters = next(s for s in sequences(tiny_llama) if s.name == "letters, lower case")
    assert len(letters.members) == 26
    assert len(letters.pairs) == 25
    assert letters.pairs[-1][1] == letters.members[-1]


def test_words_of_several_tokens_take_no_part(tiny_llama: LoadedModel) -> None:
    # One token a byte: digits and letters are all there is.
    assert {s.name for s in sequences(tiny_llama)} == {"numbers", "letters, lower case", "letters, capital"}


def test_a_tokenizer_without_any_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="no whole tokens for words of a sequence: days"):
        sequences(loaded("llama"))


def naive_logits(family: str, layer: int) -> Tensor:
    """[n_heads, tokens, vocab], by the modules of transformers: each head attends to the token itself alone."""
    model, decoder = tiny_model(family), loaded(family).decoder
    spec, names = decoder.spec, decoder.spec.family

    def module(path: str | None, root: nn.Module) -> nn.Module:
        return root.get_submodule(path) if path else nn.Identity()

    def weight(path: str, root: nn.Module) -> Tensor:
        found = root.get_submodule(path).weight
        return found.T if names.transposed else found

    def mlp(block: nn.Module, x: Tensor) -> Tensor:
        if names.mlp_output.startswith("mlp."):
            return block.mlp(x)
        return block.fc2(block.activation_fn(block.fc1(x)))

    blocks = list(model.get_submodule(names.layers))
    token_ids = torch.tensor([a for a, _ in TOKENS.pairs])
    # Gemma's embedding module scales by itself.
    x = model.get_submodule(names.embedding)(token_ids)
    if layer:
        x = module(names.post_mlp_norm, blocks[0])(mlp(blocks[0], module(names.mlp_norm, blocks[0])(x)))
    block = blocks[layer]
    x = module(names.attn_norm, block)(x)
    dim, n_heads, n_kv = spec.head_dim, spec.n_heads, spec.n_kv_heads
    if family == "gpt_neox":
        values = weight(names.qkv[0], block).view(n_heads, 3, dim, -1)[:, 2]
    else:
        values = torch.cat([weight(path, block) for path in names.qkv])[-n_kv * dim :].view(n_kv, dim, -1)
    outputs = weight(names.attn_output, block)
    logits = []
    for head in range(n_heads):
        written = x @ values[head // (n_heads // n_kv)].T @ outputs[:, head * dim : (head + 1) * dim].T
        logits.append(model.lm_head(module(names.final_norm, model)(module(names.post_attn_norm, block)(written))))
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_logits_are_those_of_a_head_that_sees_one_token(family: str, layer: int) -> None:
    circuit = OvCircuit(loaded(family).decoder, [TOKENS])
    with torch.no_grad():
        expected = naive_logits(family, layer)[:, :, circuit.members]
    logits = circuit.logits(layer)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.01


def test_a_token_is_first_when_it_is_above_all_others_of_its_sequence() -> None:
    two = [TokenSequence("low", ((0, 1), (1, 2)), (0, 1, 2)), TokenSequence("high", ((4, 5),), (4, 5))]
    circuit = OvCircuit(loaded("llama").decoder, two)
    assert circuit.members.tolist() == [0, 1, 2, 4, 5]
    logits = torch.tensor([[[0.0, 2.0, 1.0, 9.0, 0.0], [0.0, 3.0, 3.0, 9.0, 9.0], [9.0, 0.0, 0.0, 1.0, 2.0]]])
    # The second ties with another of its sequence; larger logits of another sequence do not count.
    assert circuit.is_first(logits, circuit.targets).tolist() == [[True, False, True]]
    assert float(circuit.chance) == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)


def test_a_random_target_is_of_the_sequence_and_not_the_successor() -> None:
    circuit = OvCircuit(loaded("llama").decoder, [TOKENS])
    drawn = [circuit.random_targets(torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert all((targets != circuit.targets).all() for targets in drawn)
    assert len(torch.stack(drawn)[:, 0].unique()) == len(TOKENS.members) - 1


def test_first_of_the_vocabulary_counts_every_token() -> None:
    model = loaded("qwen2")
    circuit = OvCircuit(model.decoder, [TOKENS])
    layer, head = 1, 2
    logits = model.decoder.unembed(circuit.written(layer)[head])
    expected = (logits.argmax(1) == torch.tensor([b for _, b in TOKENS.pairs])).float().mean()
    assert circuit.first_of_vocabulary(layer, head) == float(expected)
