"""benchmarks/fuzz.py for a short time, and that it would find something."""

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import grpc
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUESTS = 600


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    import fuzz

    yield fuzz
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def result(fuzzer: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = fuzzer.fuzz(REQUESTS, seed=0)
    return found


def test_whatever_arrives_ends_with_a_declared_status_and_leaves_nothing(
    fuzzer: ModuleType, result: dict[str, Any]
) -> None:
    assert not fuzzer.failed(result), result


def test_a_share_of_the_calls_is_answered_and_a_share_refused(result: dict[str, Any]) -> None:
    """Else the requests would be too wrong, or too right, to find anything."""
    assert result["codes"]["OK"] > REQUESTS / 10
    assert result["codes"]["INVALID_ARGUMENT"] > REQUESTS / 10


def test_every_rpc_has_right_calls_to_begin_from(fuzzer: ModuleType) -> None:
    assert fuzzer.calls().keys() == fuzzer.methods().keys()


def test_it_says_how_long_calls_took(result: dict[str, Any]) -> None:
    assert 0.0 < result["p99_seconds"] <= result["worst_seconds"]
    assert result["slowest"]


@pytest.mark.parametrize("seed", range(3))
def test_random_models_load_and_the_same_seed_makes_the_same(seed: int, tmp_path: Path) -> None:
    from fuzzing.models import save_random_model

    from patchclamp_server.model.load import load_model

    first, second = (save_random_model(tmp_path / name, Random(seed)) for name in ("a", "b"))
    assert first == second
    assert load_model(str(tmp_path / "a")).info.vocab_size >= 8


def test_the_same_seed_makes_the_same_calls(fuzzer: ModuleType) -> None:
    first, second, other = (list(fuzzer.cases(seed, 50)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    "change",
    [
        {"undeclared": 1},
        {"held": {"kv_blocks": 1.0}},
        {"serving": False},
        {"uncalled": ["/x"]},
        {"rss_growth_ratio": 9.0},
        {"worst_seconds": 31.0},
        {"worst_wait_seconds": 31.0},
        {"worst_idle_seconds": 31.0},
    ],
    ids=str,
)
def test_what_is_found_fails(fuzzer: ModuleType, result: dict[str, Any], change: dict[str, Any]) -> None:
    assert fuzzer.failed({**result, **change})


def test_a_fault_of_the_server_is_no_declared_status(fuzzer: ModuleType) -> None:
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE):
        assert code not in fuzzer.DECLARED
