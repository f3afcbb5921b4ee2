"""What benchmarks/neurons concludes from measurements, and how it shows them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MADE = {"date": "2026-01-01", "commit": "abc", "machine": "a machine", "text": "a text"}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"neurons.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "neurons"]:
        del sys.modules[name]


def measured(change: float, unedited: float = 10.0) -> dict[str, float]:
    return {
        "fraction": 1.0,
        "unedited": unedited,
        "change": change,
        "random_mean": 0.5,
        "beyond_random": change - 0.5,
        "beyond_random_low": change - 1.0,
        "beyond_random_high": change - 0.1,
    }


def of_relation(selective: bool) -> dict[str, Any]:
    return {
        "target": {"log_probability": [measured(-1), measured(-3)], "accuracy": [measured(0, 1), measured(-0.25, 1)]},
        "sides": {"currency": measured(-0.25), "language": measured(0.125)},
        "selective": selective,
    }


@pytest.mark.parametrize(
    ("changes", "falls"), [([-1, -2, -2], True), ([-1, -3, -2], False), ([0.5, -1], False), ([0, -1], False)]
)
def test_a_target_falls_where_no_larger_fraction_changes_it_less(changes: list[float], falls: bool, part: Any) -> None:
    assert part("shown").grows([measured(change) for change in changes], -1) is falls


def test_the_page_shows_what_was_found_whether_or_not_it_is_selective(part: Any) -> None:
    word = {"neuron": "L29N808", "value": 20.0, "unedited": -9.4, "clamped": -5.8, "random_best": -8.5, "raised": True}
    of_language = {"neurons": 191, "target": [measured(5), measured(20)], "sides": {"English": measured(1)}}
    sizes = {"fractions": [0.5, 1.0], "neurons": 460, "random_sets": 5, "facts": 12}
    result = {
        "date": "2026-01-01",
        "commit": "abc",
        "machine": "a machine",
        "words": {"dog": word},
        "relations": {
            "sizes": sizes,
            "relations": {
                "capital": {"average_precision": of_relation(True), "gradient_times_activation": of_relation(False)}
            },
        },
        "languages": {"sizes": sizes, "languages": {"German": {**of_language, "selective": True}}},
        "decoding": {
            "neurons": 46080,
            "seconds": 100.0,
            "extrapolated_8b_seconds": 36000.0,
            "extrapolated_8b_shape": {"n_layers": 32, "d_ff": 14336, "d_model": 4096, "vocab_size": 128256},
        },
    }
    page = part("page").effects(result)
    assert "| dog | L29N808 at +20 | -9.40 | -5.80 | -8.50 |" in page
    capital = "-1.00 | -3.00 | +0.50 | -3.50 (-4.00 to -3.10) | -0.25 | 1.00 → 0.75"
    assert f"| capital, average precision | {capital} | yes |" in page
    assert f"| capital, gradient times activation | {capital} | no |" in page
    assert "| German | 191 | 1.50 | 3.00 | 1.05 | +19.50 (+19.00 to +19.90) | English 1.10 | yes |" in page
    assert any("10.0 hours" in line for line in page)
    assert [share for _, share in part("page").effects_rows(result)] == ["1 of 1", "1 of 1", "1 of 1"]


def test_the_page_of_the_census_has_a_row_for_each_size(part: Any) -> None:
    counts = ("neurons", "dead", "rare", "always", "token_detectors", "ngram_detectors", "positional")
    row = {"peak_rss_bytes": 2**30, **dict.fromkeys(counts, 1234)}
    result = {
        **MADE,
        "census_rss_growth_ratio": 1.01,
        "killed": {"seen": 12_000, "resumed_tokens": 9_000, "checkpoint_tokens": 4_000},
        # As the file has it: keys of JSON are texts.
        "memory": json.loads(json.dumps({n: {"tokens": n, **row} for n in (100_000, 1_000_000)})),
    }
    page = part("page").census(result)
    assert page[2].startswith("| 100,000 | 1,024 | 1,234 |")
    assert page[3].startswith("| 1,000,000 | 1,024 | 1,234 |")


def test_the_page_of_its_speed_has_a_stream_alone_and_beside_it(part: Any) -> None:
    stream = {"p50_ms": 15.0, "p99_ms": 40.0, "first_ms": 50.0}
    result = {
        **MADE,
        "rate": {"tokens": 9_000, "tokens_per_second": {"census": 540.0, "plain": 600.0}, "ratio": 0.9},
        "streams": {"alone": stream, "beside": stream},
    }
    page = part("page").census_speed(result)
    assert page[3] == "| beside a census | 15.0 | 40.0 | 50 |"
    assert "540 against 600 tokens/s, 90 %" in page[5]
