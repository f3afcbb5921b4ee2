"""benchmarks/vectors on a tiny model: what its table, its overheads and its probe say, and how they are shown."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from live import LiveServer
from sklearn.metrics import brier_score_loss, roc_auc_score

from patchclamp import Client, datasets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What the benchmark imports of benchmarks/.
OWN = ("vectors", "neurons", "measure", "measured_code", "brown", "serving")
MADE = {"date": "2026-01-01", "commit": "abc", "machine": "a machine", "text": "a text"}
Part = Callable[[str], Any]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Part]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"vectors.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]


def interval(mean: float, reach: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def text(ratio: float = 1.2, repetition: float = 0.0) -> dict[str, Any]:
    return {
        "perplexity_ratio": interval(ratio),
        "repetition": interval(repetition),
        "words": interval(0.5),
        "example": "It snows.",
    }


def vector(
    beyond_prompt: float, ratio: float = 1.2, *, is_safe: bool = True, winner: str = "", most_beyond: float = 0.0
) -> dict[str, Any]:
    return {
        "layer": 12,
        "strength": 2.0,
        "change": 0.3,
        "is_safe": is_safe,
        "effect": interval(1.0 + beyond_prompt),
        "most_change": 0.4,
        "most_effect": interval(1.2 + beyond_prompt),
        "most_beyond_prompt": interval(most_beyond),
        "random_effect": interval(0.0),
        "beyond_prompt": interval(beyond_prompt),
        "auroc": interval(0.9, 0.05),
        "random_auroc": 0.55,
        "random": text(),
        "winner": winner,
        **text(ratio),
    }


@pytest.mark.parametrize(
    ("row", "prompt", "wins"),
    [
        (vector(0.5), text(), "vector"),
        (vector(-0.5), text(), "prompt"),
        (vector(0.05), text(), "neither"),
        (vector(-0.05), text(), "neither"),
        (vector(0.5, ratio=2.5), text(), "neither"),
        (vector(0.5, is_safe=False), text(), "neither"),
        (vector(-0.5), text(ratio=2.5), "neither"),
        (vector(-0.5), text(repetition=0.4), "neither"),
    ],
)
def test_who_wins_is_told_from_the_other_and_coherent(
    row: dict[str, Any], prompt: dict[str, Any], wins: str, part: Part
) -> None:
    assert part("table").winner(row, prompt) == wins


def test_an_effect_is_a_difference_prompt_by_prompt_so_what_prompts_have_in_common_widens_no_interval(
    part: Part,
) -> None:
    effects = part("effects")
    plain, steered = [-9.0, -1.0, 4.0, 7.0], [-8.0, 0.0, 5.0, 8.0]
    assert effects.interval(effects.less(steered, plain)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_every_method_that_takes_two_sides_of_texts_is_in_the_table(part: Part) -> None:
    found = set(part("table").EXTRACTORS)
    assert {"difference_of_means", "linear_artificial_tomography", "mean_centred", "reft_r1"} < found
    assert not {"task_vector", "definition", "causal_inner_product"} & found


def test_no_text_that_a_vector_is_judged_by_had_a_part_in_making_it(part: Part) -> None:
    concepts = part("concepts")
    for name in concepts.NAMES:
        concept = concepts.load(name)
        made_of = {text for pair in concept.known for text in pair}
        detected = [text for own in concept.detected.values() for text in own]
        assert len(detected) >= 20, name
        assert not made_of & set(detected), name
        assert len(concept.held_out.prompts) == 12, name
        assert not set(concept.choosing.prompts) & set(concept.held_out.prompts), name
        chosen_by = {*concept.choosing.positive, *concept.choosing.negative}
        assert not chosen_by & {*concept.held_out.positive, *concept.held_out.negative}, name
        # The last token gives no side away.
        assert all(text.endswith((".", "!", "?")) for pair in concept.pairs for text in pair), name


def test_a_concept_has_a_row_for_each_method_and_one_for_the_instruction(part: Part, live_server: LiveServer) -> None:
    table = part("table")
    methods = ("difference_of_means", "mean_centred")
    sizes = table.Sizes(
        concepts=("winter_summer",),
        methods=methods,
        layers=(1,),
        changes=(0.3,),
        choosing=1,
        choosing_tokens=3,
        prompts=2,
        tokens=4,
        random_vectors=1,
    )
    with Client(live_server.address) as client:
        concept = table.measure(client, sizes)["concepts"]["winter_summer"]
    assert concept["pairs"] == 30
    assert concept["detected_texts"] == 20
    assert concept["unsteered"]["perplexity_ratio"]["mean"] == 1.0
    assert tuple(concept["methods"]) == methods
    for row in concept["methods"].values():
        assert row["change"] == row["most_change"] == pytest.approx(0.3, abs=0.01)
        assert row["most_effect"] == row["effect"]
        assert row["winner"] in ("vector", "prompt", "neither")
        for measure in table.MEASURES:
            for own in (row, concept["prompt"]):
                assert own[measure]["low"] <= own[measure]["mean"] <= own[measure]["high"]
    page = part("page").methods(
        {"sizes": vars(sizes), "bounds": {"perplexity_ratio": 2.0}, "seconds": 60, **MADE}
        | {"concepts": {"winter_summer": json.loads(json.dumps(concept))}}
    )
    assert sum(line.startswith("| mean centred | 1, 30%") for line in page) == 1


def test_reading_is_compared_with_not_reading_in_the_same_rounds(part: Part, live_server: LiveServer) -> None:
    readouts = part("readouts")
    sizes = readouts.Sizes(batch=2, prompt=8, tokens=4, rounds=2)
    found = readouts.measure(live_server.model, sizes)
    assert set(found["step_milliseconds"]) == {"none", "captured_row", "features64"}
    page = part("page").readouts(found | MADE)
    assert page[3].startswith("| one captured row a request | ")
    assert page[3].endswith("| 5% |")


def test_an_overhead_is_that_of_the_middle_round(part: Part) -> None:
    found = part("readouts").overhead([1.1, 2.0, 1.02], [1.0, 1.0, 1.0])
    assert found["mean"] == 0.1
    assert (found["low"], found["high"]) == (0.02, 1.0)


def test_what_a_probe_serves_is_judged_as_scikit_learn_judges_it(part: Part, live_server: LiveServer) -> None:
    probe = part("probe")
    texts = datasets.load("sentiment").texts
    passages = [(probe.TARGET, own[:40]) for own in texts["joyful"]] + [
        (probe.OTHER, own[:40]) for own in texts["unhappy"]
    ]
    passages = passages[::2] + passages[1::2]
    sizes = probe.Sizes(training=0.5, layers=(1,))
    with Client(live_server.address) as client:
        found = probe.measure(client, passages, sizes)
        p = probe.served(client, [text for _, text in passages[40:]])
    y = np.array([label == probe.TARGET for label, _ in passages[40:]])
    served = found["served"]
    assert served["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-4)
    assert served["brier_base_rate"] == 0.25
    assert served["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-4)
    assert sum(each["texts"] for each in served["reliability"]) == len(y)
    page = part("page").probe(json.loads(json.dumps(found)) | MADE)
    assert any(f"Brier score {served['brier']:.3f}, base rate 0.250" in line for line in page)


def test_a_probability_is_as_far_off_as_its_bins_are_by_texts(part: Part) -> None:
    p = np.array([0.05, 0.05, 0.05, 0.95])
    judged = part("probe").judged(p, np.array([True, False, False, True]), base=0.5)
    assert judged["calibration_error"] == pytest.approx((3 * (1 / 3 - 0.05) + 0.05) / 4, abs=1e-4)


def test_right_probabilities_have_no_larger_calibration_error_than_chance_brings(part: Part) -> None:
    draw = np.random.default_rng(1)
    p = draw.random(400)
    probe = part("probe")
    right, wrong = (probe.judged(p, draw.random(400) < chance, base=0.5) for chance in (p, p / 2))
    assert right["calibration_error"] <= right["calibration_error_by_chance"] < wrong["calibration_error"]


@pytest.mark.parametrize(
    ("winners", "verdict"),
    [
        (("prompt", "prompt"), "Prompting wins over every method."),
        (("prompt", "neither"), "Prompting wins over mean centred."),
        (("neither", "neither"), "Prompting wins over no method."),
        (("vector", "prompt"), "Prompting wins over reft r1. It is beaten by mean centred."),
    ],
)
def test_where_prompting_wins_the_page_says_so(winners: tuple[str, str], verdict: str, part: Part) -> None:
    methods = {name: vector(0.5, winner=own) for name, own in zip(("mean_centred", "reft_r1"), winners, strict=True)}
    prompt = {"instruction": "Write of winter.", "effect": interval(0.7), "auroc": interval(0.6), **text()}
    concept = {"unsteered": text(1.0), "prompt": prompt, "methods": methods}
    result = {
        "sizes": {"prompts": 12},
        "bounds": {"perplexity_ratio": 2.0},
        "seconds": 300,
        "concepts": {"winter_summer": concept},
        **MADE,
    }
    page = part("page").methods(result)
    assert verdict in page
    assert any(
        line.startswith("| mean centred | 12, 30% | +1.50 (+1.40 to +1.60) | 40%: +1.70 | 1.20 |") for line in page
    )
    assert "| random vectors | 12, 30% | +0.00 (-0.10 to +0.10) |  | 1.20 | 0.00 | 50% | 0.55 |  |" in page
    assert any(
        line.startswith("| prompting: “Write of winter.” | | +0.70 (+0.60 to +0.80) |  | 1.20 |") for line in page
    )


def test_an_effect_beyond_prompting_at_the_end_of_the_safe_range_is_told(part: Part) -> None:
    methods = {
        "mean_centred": vector(-0.5, winner="prompt", most_beyond=0.5),
        "logistic_probe": vector(-0.5, winner="prompt", most_beyond=0.05),
        "reft_r1": vector(-0.5, winner="prompt", most_beyond=0.5, is_safe=False),
    }
    verdict = part("page")._verdict({"methods": methods, "prompt": text()}, {"perplexity_ratio": 2.0})
    assert verdict == (
        "Prompting wins over every method. "
        "At the end of the safe range the effect of mean centred is larger than its own."
    )


def test_a_summary_names_the_best_coherent_method_of_a_concept_and_the_means_of_a_method(part: Part) -> None:
    strong, safe = vector(3.0, ratio=4.0, winner="neither"), vector(0.5, winner="vector")
    concept = {"methods": {"a": strong, "b": safe}, "prompt": {"effect": interval(0.7)}}
    summary = part("__main__").summary_of({"one": concept, "two": concept})
    assert summary["concepts"]["one"] == {"method": "b", "effect": 1.5, "prompt": 0.7, "winner": "vector"}
    assert summary["methods"]["b"]["vector_wins"] == 2
    assert summary["methods"]["a"]["effect"] == 4.0
