"""benchmarks/peers on random weights: workers answer, failures of one peer are its own, and figures are summed up."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What the benchmark imports of benchmarks/.
OWN = ("peers", "measure", "measured_code", "serving", "edits")
# Figures that all peers can have.
SHARED = ("decode 1 ", "decode 8 ", "decode at", "prefill", "read", "memory", "ready")
Part = Callable[[str], Any]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Part]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"peers.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]


def card(value: float | None, reason: str = "no way", rounds: int = 2) -> dict[str, Any]:
    if value is None:
        return {"value": None, "reason": reason}
    return {"value": value, "rounds": rounds, "quartiles": [value, value], "values": [value] * rounds}


def result_of(figures: dict[str, dict[str, dict[str, Any]]], ratios: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "peers": {
            "patchclamp": {"versions": {"patchclamp": "1"}, "settings": "as it is", "waits": "passive"},
            "llama.cpp": {"versions": {"llama-cpp-python": "0.3"}, "settings": "mapped", "waits": "passive"},
        },
        "figures": figures,
        "server": {"ready": card(1.5), "memory": card(2 << 20)},
        "summary": ratios or {},
        "date": "2026-01-01",
        "commit": "abc",
        "machine": "a machine",
        "threads": 2,
        "minutes": 20.0,
        "prompt": 16,
        "file": "model.gguf",
        "file_bytes": 1 << 20,
    }


def test_a_run_asks_every_peer_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    results = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
    wanted = ["--only", "patchclamp", "transformers", "repeng", "--json", str(tmp_path / "peers.json")]
    environments = ["--env", f"transformers={sys.executable}", "repeng=false"]
    program = [sys.executable, str(BENCHMARKS / "peers.py"), "--tiny", *wanted, *environments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["batch1_vs_llama_cpp"] is None
    for name in ("programs16_vs_unsteered", "rss_over_file_embedded", "ready_seconds_embedded"):
        assert last[name] > 0
    assert last["sparse_keep50_vs_dense"] > 0
    result = json.loads((tmp_path / "peers.json").read_text())
    assert "status 1" in result["peers"]["repeng"]["error"]
    figures = result["figures"]
    assert "status 1" in figures["decode 8 programs"]["repeng"]["reason"]
    for peer in ("patchclamp", "transformers"):
        assert all(figures[name][peer]["value"] for name in figures if name.startswith(SHARED))
        # Both do what plain torch does, steered and not.
        for steering in ("unsteered", "all layers"):
            assert figures[f"first choices equal, {steering}"][peer]["value"] == 1.0
            assert figures[f"mean KL, {steering}"][peer]["value"] < 1e-8
    assert figures["sparse griffin"]["transformers"] == {"value": None, "reason": "of Patchclamp alone"}
    assert results == {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}


@pytest.fixture
def hooked(part: Part, tmp_path: Path) -> Iterator[Any]:
    """A worker of transformers with hooks, on 14 random layers of 64."""
    directory = part("models").tiny_directory(tmp_path / "model")
    np.save(tmp_path / "vectors.npy", part("cases").vectors(64, 14))
    process = part("process")
    command = [sys.executable, str(process.WORKERS / "transformers_worker.py")]
    with process.Worker(command, process.environment(2), 120.0) as worker:
        worker.ask("load", model=str(directory), vectors=str(tmp_path / "vectors.npy"), threads=2)
        yield worker


def test_different_programs_in_one_batch_say_what_each_says_alone(part: Part, hooked: Any) -> None:
    cases = part("cases")
    prompts, programs = cases.prompts(range(256), 4, 16), cases.programs("programs", 4, 14)
    batch = hooked.ask("decode", prompts=prompts, tokens=6, programs=programs, one_by_one=1)
    assert batch["decoded"] == 4 * 5
    for prompt, program, row in zip(prompts, programs, batch["tokens"], strict=True):
        alone = hooked.ask("decode", prompts=[prompt], tokens=6, programs=[program], one_by_one=1)
        assert alone["tokens"] == [row]


def test_what_a_worker_raises_is_an_error_and_the_next_question_is_answered(part: Part, hooked: Any) -> None:
    with pytest.raises(part("process").PeerError, match=r"AttributeError: .*nonsense"):
        hooked.ask("nonsense")
    assert hooked.resident_bytes() > 0
    assert hooked.ask("read", prompt=[1, 2, 3], layers=14, path=None)["shape"] == [14, 3, 64]


def test_rounds_that_would_end_after_the_budget_are_left_out(part: Part, hooked: Any) -> None:
    rounds, cases = part("rounds"), part("cases")
    run = rounds.Rounds(rounds.Setting(range(256), 14), budget_seconds=0.0)
    run.workers["transformers"] = hooked
    one = cases.Case("decode 1 unsteered", "decode", cases.Effort(3, 2), cases.Effort(3, 2))
    run.run([one], 2)
    assert run.left_out == 1
    assert run.figures["decode 1 unsteered"]["transformers"].card()["rounds"] == 1


def test_a_worker_that_does_not_answer_in_time_is_ended(part: Part) -> None:
    process = part("process")
    with process.Worker(["sleep", "60"], process.environment(2), 0.05) as worker:
        with pytest.raises(process.PeerError, match="no answer to 'load' within 0 s"):
            worker.ask("load")
        assert worker.process.wait(60) != 0


def test_programs_differ_and_leave_the_first_layer_alone(part: Part) -> None:
    cases = part("cases")
    programs = cases.programs("programs", 64, 30)
    assert len({json.dumps(program) for program in programs}) == 64
    for steering in cases.STEERING:
        assert all("0" not in (program or {}) for program in cases.programs(steering, 8, 30))
    assert list(cases.programs("all layers", 1, 30)[0]) == [str(layer) for layer in range(1, 30)]
    rows = cases.vectors(8, 30)
    assert max(row for program in programs for row in program.values()) < len(rows)


def test_prompts_are_parts_of_the_text_one_behind_the_other(part: Part) -> None:
    assert part("cases").prompts([1, 2, 3, 4, 5], 3, 2) == [[1, 2], [3, 4], [5, 1]]


def test_a_figure_without_a_value_says_why(part: Part) -> None:
    figures = part("figures")
    assert figures.Figure(reason="no batch").card() == {"value": None, "reason": "no batch"}
    found = figures.Figure([1.0, 4.0, 2.0]).card()
    assert (found["value"], found["quartiles"], found["rounds"]) == (2.0, [1.5, 3.0], 3)


def test_a_ratio_is_the_median_of_the_ratios_of_rounds(part: Part) -> None:
    ratio = part("figures").ratio
    # The second round was slow for both, and the fourth has no partner.
    assert ratio([20.0, 8.0, 22.0, 30.0], [10.0, 4.0, 10.0])["value"] == 2.0
    assert ratio([], [1.0]) is None


def test_a_rate_of_a_long_prompt_is_its_length_over_the_time_to_the_first_token(part: Part) -> None:
    cases, rounds = part("cases"), part("rounds")
    case = cases.Case("context 512", "context", cases.Effort(8, 1), cases.Effort(8, 1), length=512)
    answer = {"prefill_seconds": 2.0, "decode_seconds": 0.5, "decoded": 7}
    named = dict(zip(rounds.figures_of(case), rounds.rates(case, answer), strict=True))
    assert named == {"prefill 512": 256.0, "decode at 512": 14.0}


def test_the_summary_compares_rounds_and_takes_the_quickest_policy_that_keeps_quality(part: Part) -> None:
    Figure = part("figures").Figure
    figures = {
        "decode 1 unsteered": {"patchclamp": Figure([30.0, 30.0]), "llama.cpp": Figure([60.0, 40.0])},
        "decode 1 all layers": {"patchclamp": Figure([24.0, 30.0])},
        "decode 16 unsteered": {"patchclamp": Figure([100.0]), "llama.cpp": Figure(reason="it ended")},
        "decode 16 edited": {"patchclamp": Figure([95.0])},
        "sparse fovea": {"patchclamp": Figure([27.0, 27.0])},
        "sparse glance": {"patchclamp": Figure([36.0, 33.0])},
        "sparse griffin": {"patchclamp": Figure([60.0, 60.0])},
        "sparse wina": {"patchclamp": Figure(reason="it failed")},
    }
    server = {"ready": Figure([4.0, 3.0, 3.5]), "memory": Figure([300.0])}
    found = part("summary").last_line(part("summary").summary(figures, 100, server))
    assert found["batch1_vs_llama_cpp"] == 0.625
    assert found["batch16_vs_llama_cpp"] is None
    assert found["all_layer_steering_overhead"] == 0.125
    assert found["programs16_vs_unsteered"] == 0.95
    assert (found["sparse_keep50_policy"], found["sparse_keep50_vs_dense"]) == ("glance", 1.15)
    assert (found["rss_over_file_embedded"], found["ready_seconds_embedded"]) == (3.0, 3.5)


def test_agreement_of_equal_logits_is_whole_whatever_is_added_to_a_row(part: Part) -> None:
    import torch

    agreement = part("equality").agreement
    logits = torch.randn(70, 11, generator=torch.Generator().manual_seed(0))
    assert agreement(logits, logits + 3.0) == (1.0, pytest.approx(0.0, abs=1e-12))
    other = logits.clone()
    other[0] = torch.nn.functional.one_hot(logits[0].argmin(), 11) * 50.0
    share, divergence = agreement(logits, other)
    assert share == pytest.approx(69 / 70)
    assert divergence > 0.1


def test_the_page_names_the_rows_in_which_a_peer_is_better(part: Part) -> None:
    figures = {
        "decode 1 unsteered": {"patchclamp": card(50.0), "llama.cpp": card(100.0)},
        "prefill 512": {"patchclamp": card(400.0), "llama.cpp": card(200.0)},
        "ready": {"patchclamp": card(4.0), "llama.cpp": card(1.0)},
        # Both are rounding.
        "mean KL, unsteered": {"patchclamp": card(1e-11), "llama.cpp": card(0.0)},
        "decode 16 edited": {"patchclamp": card(90.0), "llama.cpp": card(None, "of Patchclamp alone")},
        "read 512": {"patchclamp": card(90.0), "llama.cpp": card(None, "no callback")},
        "sparse cats": {"patchclamp": card(60.0), "llama.cpp": card(None, "of Patchclamp alone")},
    }
    page = part("page")
    assert page.behind(figures) == [
        ("start to ready", "llama.cpp", 0.25),
        ("1 request, unsteered", "llama.cpp", 0.5),
    ]
    text = "\n".join(page.tables(result_of(figures)))
    assert "| 1 request, unsteered | 50.0 | **100.0** |" in text
    assert "| prompt of 512 tokens | **400.0** | 200.0 |" in text
    assert "- 1 request, unsteered: 0.50 of llama.cpp" in text
    assert "— of llama.cpp (read 512): no callback." in text
    assert "over dense: cats 1.20." in text
    assert "of Patchclamp alone" not in text


def test_the_readme_has_the_ratios_that_were_measured(part: Part) -> None:
    ratios = {
        "batch1_vs_llama_cpp": {"value": 0.9, "quartiles": [0.8, 1.0]},
        "batch8_vs_llama_cpp": None,
        "batch64_vs_llama_cpp": None,
        "programs16_vs_llama_cpp": {"value": 1.5, "quartiles": [1.4, 1.6]},
        "prefill2048_vs_llama_cpp": None,
    }
    rows = part("page").summary_rows(result_of({}, ratios))
    assert [figure for _, figure in rows] == ["0.90 x", "1.50 x"]


def test_the_picture_has_a_row_for_every_case_that_was_measured(part: Part) -> None:
    figures = {
        "decode 1 unsteered": {"patchclamp": card(50.0), "llama.cpp": card(100.0)},
        "prefill 512": {"patchclamp": card(400.0), "llama.cpp": card(None)},
    }
    axes = part("picture").rates_figure(result_of(figures)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 request", "prompt of 512"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["patchclamp", "llama.cpp"]


def test_an_environment_of_other_versions_is_made_anew(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = part("environments")
    monkeypatch.setitem(environments.REQUIREMENTS, "repeng", ())
    stamp = tmp_path / "repeng" / environments.STAMP
    stamp.parent.mkdir()
    stamp.write_text('["repeng==0.1"]')
    (stamp.parent / "old").write_text("")
    # pip refuses to install nothing, which is said.
    with pytest.raises(environments.NotInstalled, match="You must give at least one requirement"):
        environments.interpreter(tmp_path, "repeng")
    assert not (stamp.parent / "old").exists()
    assert not stamp.exists()
