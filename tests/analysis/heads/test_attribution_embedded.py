"""Attribution on the embedded model: exact against transformers, and it finds where a capital is read from."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp_server.analysis.heads.circuits.attribution import attribute
from patchclamp_server.model.load import LoadedModel


@pytest.fixture(scope="module")
def plain(embedded_dir: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded_dir, dtype=torch.float32)
    return model


def ids(model: LoadedModel, text: str) -> list[int]:
    tokens: list[int] = model.tokenizer(text)["input_ids"]
    return tokens


@pytest.mark.parametrize(
    ("text", "target", "contrast"),
    [
        ("The capital of France is", " Paris", " Rome"),
        ("When Tom and James went to the park, James handed the ball to", " Tom", " James"),
        ("The cat sat on the mat. " * 20 + "The cat sat on the", " mat", " dog"),
    ],
)
def test_the_parts_sum_to_the_logit_difference_of_transformers(
    embedded: LoadedModel, plain: PreTrainedModel, text: str, target: str, contrast: str
) -> None:
    tokens, (yes,), (no,) = ids(embedded, text), ids(embedded, target), ids(embedded, contrast)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([tokens])).logits[0, -1]
    found = attribute(embedded.decoder, tokens, yes, no)
    assert found.logit_difference == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert found.parts_sum == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def test_the_strongest_head_reads_the_capital_off_the_country(embedded: LoadedModel) -> None:
    tokens, (paris,), (rome,) = (ids(embedded, text) for text in ("The capital of France is", " Paris", " Rome"))
    strongest = attribute(embedded.decoder, tokens, paris, rome).heads[0]
    assert strongest.sources[tokens.index(*ids(embedded, " France"))] > 0.9 * strongest.part > 0
