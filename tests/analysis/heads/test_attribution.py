"""Direct logit attribution: its parts sum to the logit difference, and each is what transformers' activations say."""

from functools import cache

import pytest
import torch
from attribution_oracle import NaiveAttribution
from circuit_oracle import last_logits
from engine_runs import Job, run_alone
from tiny_models import FAMILIES, VOCAB, tiny_model

from patchclamp_server.analysis.heads.circuits.attribution import LogitAttribution, attribute
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import LogitLensReadout, Program, Readout, Scope, TokenSelector
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers

TOLERANCE = 1e-4
TARGET, CONTRAST = 5, 9
# The window of the families that have one is 12 tokens.
TOKENS = 17


@cache
def decoder(family: str) -> Decoder:
    return decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")


def prompt(tokens: int = TOKENS) -> list[int]:
    ids: list[int] = torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return ids


def found(family: str, tokens: int = TOKENS, top_heads: int = 10) -> LogitAttribution:
    return at_once(attribute(decoder(family), prompt(tokens), TARGET, CONTRAST, top_heads))


def truth(family: str, tokens: int = TOKENS) -> NaiveAttribution:
    return NaiveAttribution(tiny_model(family), prompt(tokens), TARGET, CONTRAST)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 2, TOKENS, 40])
def test_the_parts_sum_to_the_logit_difference_of_transformers(family: str, tokens: int) -> None:
    logits = last_logits(tiny_model(family), prompt(tokens))
    if family == "gemma2":
        cap = tiny_model(family).config.final_logit_softcapping
        logits = torch.atanh(logits / cap) * cap
    attribution = found(family, tokens)
    assert attribution.parts_sum == pytest.approx(float(logits[TARGET] - logits[CONTRAST]), abs=TOLERANCE)
    assert attribution.logit_difference == pytest.approx(attribution.parts_sum, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_mlps_are_what_the_lens_reads_as_the_text_runs(family: str) -> None:
    lens = LogitLensReadout(token_ids=(TARGET, CONTRAST))
    scope = Scope((TokenSelector(last_k=1),))
    read = Program(readouts=(Readout(lens, Site.MLP_OUT, "mlp", all_layers=True, scope=scope),))
    outcome = run_alone(family, Job(tuple(prompt()), read, max_tokens=1), EngineConfig())
    seen = [value.values[0] - value.values[1] for value in outcome.readouts]
    assert seen == pytest.approx(list(found(family).mlps), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_contrast_they_sum_to_the_logit(family: str) -> None:
    alone = at_once(attribute(decoder(family), prompt(), TARGET))
    assert alone.parts_sum == pytest.approx(float(truth(family).uncapped[TARGET]), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_mlps_are_what_they_add_through_the_frozen_norm(family: str) -> None:
    attribution, naive = found(family), truth(family)
    assert attribution.embedding == pytest.approx(naive.part(naive.row(Site.RESID_PRE, 0)), abs=TOLERANCE)
    expected = [naive.part(naive.row(Site.MLP_OUT, layer)) for layer in range(3)]
    assert attribution.mlps == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_its_output_through_its_columns_of_the_output_projection(family: str) -> None:
    attribution, naive = found(family), truth(family)
    for head in attribution.heads:
        z = naive.row(Site.ATTN_Z, head.layer).view(decoder(family).spec.n_heads, -1)[head.head]
        assert head.part == pytest.approx(naive.head(head.layer, head.head, z), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_is_an_attention_weight_times_a_value(family: str) -> None:
    attribution, naive = found(family, top_heads=12), truth(family)
    weights, values = naive.weights(), [naive.values(layer) for layer in range(3)]
    for head in attribution.heads:
        row, value = weights[head.layer][head.head], values[head.layer][:, head.head]
        expected = [naive.head(head.layer, head.head, row[j] * value[j]) for j in range(TOKENS)]
        assert head.sources == pytest.approx(expected, abs=TOLERANCE)
        assert sum(head.sources) == pytest.approx(head.part, abs=1e-9)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_what_the_window_hides_gives_nothing(family: str) -> None:
    for head in found(family, top_heads=12).heads:
        hidden = 0 if decoder(family).spec.windows[head.layer] == 0 else TOKENS - 12
        assert [source == 0.0 for source in head.sources] == [True] * hidden + [False] * (TOKENS - hidden)


def test_all_heads_come_by_size_and_the_top_ones_are_split() -> None:
    heads = found("llama", top_heads=3).heads
    sizes = [abs(head.part) for head in heads]
    assert sizes == sorted(sizes, reverse=True)
    assert len({(head.layer, head.head) for head in heads}) == 12
    assert [len(head.sources) for head in heads] == [TOKENS] * 3 + [0] * 9


def test_the_bias_of_an_unembedding_belongs_to_the_biases() -> None:
    with_bias = decoder_from_transformers(tiny_model("llama"), dtype=torch.float32, device="cpu")
    with_bias.unembedding.bias = torch.arange(VOCAB, dtype=torch.float32)
    plain, biased = found("llama"), at_once(attribute(with_bias, prompt(), TARGET, CONTRAST))
    assert biased.biases - plain.biases == pytest.approx(TARGET - CONTRAST, abs=1e-5)
    assert biased.logit_difference == pytest.approx(biased.parts_sum, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_epsilon_of_a_norm_is_part_of_its_scale(family: str) -> None:
    model = decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")
    model.final_norm = Norm(model.final_norm.weight, model.final_norm.bias, eps=0.5)
    attribution = at_once(attribute(model, prompt(), TARGET, CONTRAST))
    assert attribution.logit_difference == pytest.approx(attribution.parts_sum, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("tokens", "contrast", "field"),
    [([], CONTRAST, "prompt"), ([7] * 641, CONTRAST, "prompt"), ([7], TARGET, "contrast")],
)
def test_what_cannot_be_attributed_is_refused(tokens: list[int], contrast: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        at_once(attribute(decoder("llama"), tokens, TARGET, contrast))
    assert refused.value.field == field
