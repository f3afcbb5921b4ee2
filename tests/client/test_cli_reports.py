"""What `patchclamp sparsity`, `patchclamp heads` and `patchclamp generate --sparsity` send and print."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canned import HEAD_SET, Generations, Heads, Models, Sparsities

from patchclamp.cli import main
from patchclamp.heads import Needle, StoppingRule, TemporalFact
from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea, griffin
from patchclamp.v1 import generation_pb2
from patchclamp.v1 import head_pb2 as pb

Serve = Callable[..., str]
PAIR = {"clean": "Mary and John", "corrupt": "Mary and Mary", "clean_answer": " Mary", "corrupt_answer": " John"}


@pytest.fixture
def sparsities() -> Sparsities:
    return Sparsities()


@pytest.fixture
def heads() -> Heads:
    return Heads()


@pytest.fixture
def generations() -> Generations:
    return Generations()


@pytest.fixture(autouse=True)
def address(
    serve: Serve, sparsities: Sparsities, heads: Heads, generations: Generations, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(sparsity=sparsities, heads=heads, generation=generations, models=Models())
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", address)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return written(tmp_path / "words.txt", "some words")


def written(file: Path, content: str) -> str:
    file.write_text(content)
    return str(file)


def lines(file: Path, *items: dict[str, Any]) -> str:
    return written(file, "\n".join(map(json.dumps, items)))


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_the_report_beside_the_text(generations: Generations, capsys: pytest.CaptureFixture[str]):
    spec = "fovea:keep_ratio=.5,bits=3,profile=mine"
    assert main(["generate", "hi", "--sparsity", spec, "--sparsity-guard", "max_divergence=.125,window=4"]) == 0
    sent = Sparsity("mine", fovea(keep_ratio=0.5, bits=3), QualityGuard(max_divergence=0.125, window=4))
    assert generations.request.sparsity == sent.message()
    printed = capsys.readouterr()
    assert printed.out == "a sandwich\n"
    assert "sparsity fovea (mine): 1 sparse tokens" in printed.err
    assert "FELL BACK to dense from position 10" in printed.err


def test_the_report_is_part_of_the_json(capsys: pytest.CaptureFixture[str]):
    report = json_of(capsys, "generate", "hi", "--sparsity", "mine", "--sparsity-guard", "on")["sparsity"]
    assert (report["profile"], report["guard"]["dense_from"]) == ("mine", 10)
    assert json_of(capsys, "generate", "hi")["sparsity"] is None


def test_score_and_compare_are_sparse_too(generations: Generations, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "hi", " you", "--sparsity", "cats"]) == 0
    assert "sparsity cats" in capsys.readouterr().err
    assert main(["compare", "hi", "--sparsity", "cats"]) == 0
    assert "sparsity cats" in capsys.readouterr().err
    assert generations.request.sparsity == Sparsity(policy=cats()).message()


def test_calibrate_stores_a_profile_and_prints_its_card(
    sparsities: Sparsities, text: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["sparsity", "calibrate", "mine", "--policy", "fovea:keep_ratio=.5", "--text", text]) == 0
    assert sparsities.request.policy == fovea(keep_ratio=0.5)
    assert list(sparsities.request.text.texts) == ["some words"]
    assert sparsities.request.text.description == "words.txt"
    assert list(sparsities.request.tags) == ["mine"]
    printed = capsys.readouterr()
    header, own, control = printed.out.splitlines()
    assert header.split() == ["perplexity", "ratio", "KL", "top-1", "sparsity", "bytes", "read"]
    assert own.split() == ["mine", "1.0206", "0.0224", "0.902", "0.500", "0.682"]
    assert control.split()[:3] == ["random", "set", "99.3627"]
    assert "stored as mine = sha256:abab" in printed.err


def test_calibrate_answers_in_json(text: str, capsys: pytest.CaptureFixture[str]):
    found = json_of(capsys, "sparsity", "calibrate", "mine", "--policy", "cats", "--text", text)
    assert found["quality"]["perplexity_ratio"] == 1.0206


def test_evaluate_measures_every_policy_at_every_ratio(
    sparsities: Sparsities, text: str, capsys: pytest.CaptureFixture[str]
):
    specs = ["cats:keep_ratio=.9", "fovea:bits=2,profile=mine"]
    assert main(["sparsity", "evaluate", *specs, "--keep", ".5", ".3", "--speed", "--text", text, text]) == 0
    assert list(sparsities.request.sparsities) == [
        Sparsity(policy=cats(keep_ratio=0.5)).message(),
        Sparsity(policy=cats(keep_ratio=0.3)).message(),
        Sparsity("mine", fovea(bits=2, keep_ratio=0.5)).message(),
        Sparsity("mine", fovea(bits=2, keep_ratio=0.3)).message(),
    ]
    assert sparsities.request.measure_speed
    assert len(sparsities.request.text.texts) == 2
    printed = capsys.readouterr()
    header, first, *_ = printed.out.splitlines()
    assert header.split()[-2:] == ["set", "speed-up"]
    assert first.split() == [
        "cats:keep_ratio=.9",
        "0.5",
        "1.0206",
        "0.0224",
        "0.902",
        "0.500",
        "0.682",
        "99.3627",
        "1.25",
    ]
    assert "dense perplexity 37.22" in printed.err


def test_evaluate_without_timing_has_no_column_for_it(text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["sparsity", "evaluate", "cats", "mine", "--text", text]) == 0
    assert "speed-up" not in capsys.readouterr().out


def test_a_profile_alone_has_no_ratio_to_vary(text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["sparsity", "evaluate", "mine", "--keep", ".5", "--text", text]) == 2
    assert "POLICY:profile=mine" in capsys.readouterr().err


def test_core_prints_sets_and_overlaps(sparsities: Sparsities, capsys: pytest.CaptureFixture[str]):
    arguments = ["sparsity", "core", "a cat", "a dog", "--sparsity", "griffin:keep_ratio=.4", "--layers", "3-4"]
    assert main(arguments) == 0
    assert sparsities.request.sparsity == Sparsity(policy=griffin(keep_ratio=0.4)).message()
    assert list(sparsities.request.layers) == [3, 4]
    printed = capsys.readouterr().out
    assert "prompt 1: a dog" in printed
    assert "10 11 12 13 14 15 16 17 ..." in printed
    assert printed.splitlines()[-1].split() == ["0,", "1", "0.375", "0.250", "0.500"]
    assert json_of(capsys, *arguments)["prompts"][0]["3"] == [1, 2, 5]


def test_plot_draws_what_evaluate_printed(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert main(["sparsity", "evaluate", "cats", "mine", "--text", text, "--json"]) == 0
    results = written(tmp_path / "results.json", capsys.readouterr().out)
    picture = tmp_path / "out.png"
    assert main(["sparsity", "plot", results, str(picture)]) == 0
    assert "3 policies" in capsys.readouterr().err
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_plot_refuses_a_file_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    results = written(tmp_path / "results.json", "{}")
    with pytest.raises(SystemExit) as exit_:
        main(["sparsity", "plot", results, str(tmp_path / "out.png")])
    assert exit_.value.code == 2
    assert "sparsity evaluate --json" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_detect_prints_scores_heat_map_and_needle_grid(heads: Heads, capsys: pytest.CaptureFixture[str]):
    assert main(["heads", "detect", "retrieval"]) == 0
    assert list(heads.request.tags) == ["retrieval"]
    assert not heads.request.HasField("stopping")
    printed = capsys.readouterr()
    assert "2 of 3 needles found, stopped early" in printed.out
    assert "2 heads (33.3%) score at least 0.1; stability of the ten best 0.90" in printed.out
    assert "L1H2  0.7500           0.6250 to 0.8750  always on" in printed.out
    assert "L1 |    ██|" in printed.out
    assert " 0.10  1/2    -" in printed.out
    assert f"stored as retrieval = {HEAD_SET.id}" in printed.err


def test_detect_sends_its_own_needles_and_when_to_stop(
    heads: Heads, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    needles = lines(tmp_path / "needles.jsonl", {"question": "where?", "needle": "Here.", "answer": "here"})
    arguments = ["--haystack", text, "--needles", needles, "--lengths", "256,512", "--depths", ".1,.9"]
    more = ["--max-runs", "9", "--seed", "4", "--stop", "top_k=5,window=3", "--threshold", "0.2"]
    assert json_of(capsys, "heads", "detect", "retrieval", *arguments, *more)["successes"] == 2
    test = heads.request.test
    assert list(test.haystacks) == ["some words"]
    assert list(test.needles) == [Needle("where?", "Here.", "here").message()]
    assert (list(test.lengths), list(test.depths)) == ([256, 512], [0.1, 0.9])
    assert (test.max_runs, test.seed, heads.request.threshold) == (9, 4, 0.2)
    assert heads.request.stopping == StoppingRule(top_k=5, window=3).message()


def test_detect_writes_both_pictures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    heat_map, grid = tmp_path / "heads.png", tmp_path / "grid.svg"
    assert main(["heads", "detect", "retrieval", "--heatmap", str(heat_map), "--grid", str(grid), "--stop", "on"]) == 0
    assert heat_map.read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in grid.read_text()


def test_score_prints_scores_without_intervals_where_there_are_none(
    heads: Heads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    facts = lines(tmp_path / "facts.jsonl", {"prompt": "In 1999", "answer": " it", "time_conditioned": True})
    assert main(["heads", "score", "temporal", "time", "--facts", facts, "--seed", "3"]) == 0
    assert heads.request.method == pb.HEAD_SCORE_METHOD_TEMPORAL
    assert list(heads.request.facts) == [TemporalFact("In 1999", " it", True).message()]
    assert (heads.request.seed, list(heads.request.tags)) == (3, ["time"])
    printed = capsys.readouterr().out
    assert "interval" not in printed
    assert "L1 |    ██|" in printed


def test_ablate_prints_edited_beside_unedited_and_random(heads: Heads, capsys: pytest.CaptureFixture[str]):
    assert main(["heads", "ablate", "retrieval", "--top", "1", "--mode", "uniform", "--random-sets", "2"]) == 0
    assert heads.request.heads == pb.HeadSelection(head_set="retrieval", top_k=1)
    assert (heads.request.mode, heads.request.random_sets) == (pb.HEAD_EDIT_MODE_UNIFORM, 2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == ["unedited", "7/12", "0.583", "26.200"]
    assert rows[1] == ["uniform", "L1H2", "0/12", "0.000", "27.900"]
    assert rows[2][:3] == ["uniform", "L0H0", "(random)"]
    assert rows[4][-6:] == ["7.0", "±", "1.0", "26.375", "±", "0.125"]


def test_ablate_takes_a_list_of_heads_and_a_scale(heads: Heads, capsys: pytest.CaptureFixture[str]):
    json_of(capsys, "heads", "ablate", "L18H6,L17H3", "--mode", "scale", "--scale", "0.5")
    assert [(each.layer, each.head) for each in heads.request.heads.heads.heads] == [(18, 6), (17, 3)]
    assert heads.request.scale == 0.5


@pytest.mark.parametrize("arguments", [["--mode", "scale"], ["--scale", ".5"], ["--top", "3"]])
def test_a_contradiction_in_an_ablation_exits_with_2(arguments: list[str]):
    assert main(["heads", "ablate", "L18H6", *arguments]) == 2


def test_circuit_prints_effects_and_faithfulness(heads: Heads, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = lines(tmp_path / "pairs.jsonl", PAIR)
    assert main(["heads", "circuit", "ioi", "--pairs", pairs, "--method", "path_patching", "--circuit-size", "2"]) == 0
    assert heads.request.pairs[0].corrupt.text == "Mary and Mary"
    assert (heads.request.method, heads.request.circuit_size) == (pb.CIRCUIT_METHOD_PATH_PATCHING, 2)
    printed = capsys.readouterr().out
    assert "faithfulness 0.875; of random circuits 0.125 ± 0.062" in printed
    assert "3.500 clean, -3.250 corrupt" in printed
    assert "L0 |  ##  |" in printed


def test_ground_shows_the_answer_and_where_it_was_copied_from(
    generations: Generations, capsys: pytest.CaptureFixture[str]
):
    assert main(["heads", "ground", "retrieval", "eat what?", "--top", "5", "--max-tokens", "8", "--chat"]) == 0
    assert generations.request.grounding == generation_pb2.Grounding(head_set="retrieval", top_k=5)
    assert generations.request.prompt.chat.messages[0].content == "eat what?"
    printed = capsys.readouterr()
    answer, _, _, header, place = printed.out.splitlines()
    assert answer == "a sandwich"
    assert header.split() == ["positions", "tokens", "most", "by", "text"]
    assert place.split() == ["4-4", "1", "L1H2", '"', 'a\\n"']
    assert "grounding: 1 tokens (50%)" in printed.err
    report = json_of(capsys, "heads", "ground", "retrieval", "eat what?")
    assert report["grounding"]["ranges"][0]["start"] == report["tokens"][0]["sources"][0]["position"] == 4


def test_confidence_is_shown_by_layer_and_summed_up(generations: Generations, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "is it?", "--option", " yes", "--option", " no"]) == 0
    assert generations.request.confidence == generation_pb2.Confidence(options=[" yes", " no"])
    printed = capsys.readouterr()
    answer, _, _, header, *layers = printed.out.splitlines()
    assert answer == "a sandwich"
    assert header.split() == ["layer", "agrees", "token", '"', 'yes"', '"', 'no"']
    assert [line.split() for line in layers][1] == ["1", "50.0%", "0.2500", "0.5000", "0.5000"]
    assert "layers before the last agree by 37.5% over 1 token, ' yes' 50.0% at layer 2" in printed.err
    report = json_of(capsys, "generate", "hi", "--confidence")["confidence"]
    assert (report["layer_agreement"], report["options"]) == ([0.25, 0.5, 1.0], [])
    assert json_of(capsys, "generate", "hi")["confidence"] is None


def test_confidence_in_a_continuation_is_shown(generations: Generations, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "hi", " you", "--confidence"]) == 0
    printed = capsys.readouterr()
    assert "confidence by layer" in printed.out
    assert "agree by 37.5% over 2 tokens" in printed.err
    assert json_of(capsys, "score", "hi", " you", "--confidence")["confidence"]["consistency"] == 0.375


def test_compare_names_the_head_sets_it_compares(heads: Heads, capsys: pytest.CaptureFixture[str]):
    assert main(["heads", "compare", "one", "two", "--top", "4"]) == 0
    assert (list(heads.request.head_sets), heads.request.top_k) == (["one", "two"], 4)
    assert capsys.readouterr().out.splitlines()[1].split() == ["one,", "two", "3", "0.25", "0.500", "0.750", "0.950"]


def test_attribute_lists_the_largest_parts_with_their_sources(heads: Heads, capsys: pytest.CaptureFixture[str]):
    assert main(["heads", "attribute", "The cat", "--target", " sat", "--contrast", " ran", "--top-heads", "2"]) == 0
    assert (heads.request.target, heads.request.contrast, heads.request.top_heads) == (" sat", " ran", 2)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["L1H2", "+2.0000", '"', 'cat"@1', "+1.750", '"The"@0', "+0.250"]
    assert "logit difference 2.5000, sum of all parts 2.5000" in printed
    assert "L0 |  --  |" in printed
    assert json_of(capsys, "heads", "attribute", "The cat", "--target", " sat")["embedding"] == 0.5
