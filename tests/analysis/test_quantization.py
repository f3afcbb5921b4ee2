"""The quality of a quantised model, and the command that measures it."""

import json
import math
from pathlib import Path

import pytest
import torch

from patchclamp.cli import main
from patchclamp_server.analysis.quantization import compare, logprobs_of, passages
from patchclamp_server.model.load import load_model
from patchclamp_server.model.quantization.scheme import SCHEMES


def test_the_figures_are_those_of_their_formulas() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    quality = compare(p.log()[None], q.log()[None], torch.tensor([[0, 1, 2]]))
    assert quality.divergence == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2, abs=1e-6)
    assert quality.top1_agreement == 0.5
    assert quality.perplexity_ratio == pytest.approx(math.exp(0.5 * math.log(0.25 / 0.5)), rel=1e-6)
    assert quality.dense_perplexity == pytest.approx(math.exp(-0.5 * math.log(0.25 * 0.6)), rel=1e-6)
    assert quality.tokens == 2


def test_a_model_does_not_differ_from_itself(tiny_llama_dir: Path) -> None:
    model = load_model(str(tiny_llama_dir))
    documents = passages(model)
    logprobs = logprobs_of(model, documents)
    assert documents.shape == (4, 128)
    quality = compare(logprobs, logprobs, documents)
    assert (quality.divergence, quality.top1_agreement, quality.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_the_command_measures_prints_and_keeps_the_card(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path))
    assert main(["quantize-card", "--model", str(tiny_llama_dir), "--quantize", "q8_0", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["scheme"] == "q8_0"
    assert card["formats"][0]["format"] == "q8_0"
    assert 0 < card["quality"]["divergence"] < 0.01
    assert 0.9 < card["quality"]["top1_agreement"] <= 1
    kept = load_model(str(tiny_llama_dir), quantize=SCHEMES["q8_0"]).info.quantization
    assert kept is not None
    assert kept.quality is not None
    assert kept.quality.divergence == card["quality"]["divergence"]


def test_the_command_shows_the_card_as_text(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path))
    assert main(["quantize-card", "--model", str(tiny_llama_dir), "--quantize", "q4_k"]) == 0
    shown = capsys.readouterr().out
    assert "in q4_k: " in shown
    assert "same first choice" in shown
    # The 14 matrices of blocks are named together, those of a real model are hundreds.
    assert "matrices are in q5_0: rows of 32 weights are not whole blocks of 256, as q4_k has" in shown
    assert shown.count("not whole") == 3


@pytest.mark.parametrize(("given", "missing"), [(["--model", "x"], "--quantize"), (["--quantize", "q4_k"], "--model")])
def test_what_the_command_needs_is_named(given: list[str], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize-card", *given]) == 1
    assert capsys.readouterr().err == f"patchclamp quantize-card: error: {missing} is needed\n"
