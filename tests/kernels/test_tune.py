"""The offline tuner, with a timer that needs no GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from patchclamp_kernels import configs, ops, tune
from patchclamp_kernels.cases import TuningCase
from patchclamp_kernels.configs import Config

SMALL, MIDDLE, LARGE = (Config({"BLOCK": size}) for size in (32, 64, 128))


@dataclass(frozen=True)
class Outputs:
    values: Tensor
    count: int = 0


def case(run: Callable[[Config], object], *candidates: Config, op: str = "op", bucket: str = "bucket") -> TuningCase:
    return TuningCase(op, bucket, candidates or (SMALL, MIDDLE, LARGE), run)


def block(config: Config) -> Tensor:
    """An op whose result tells the timer which configuration ran."""
    return torch.tensor(float(config.blocks["BLOCK"]))


def timer_of(milliseconds: dict[int, float]) -> tune.Timer:
    def timer(run: Callable[[], object]) -> float:
        result = run()
        assert isinstance(result, Tensor)
        return milliseconds[int(result)]

    return timer


def test_the_fastest_candidate_is_chosen() -> None:
    trials = tune.try_candidates(case(block), timer_of({32: 3.0, 64: 1.0, 128: 2.0}))
    assert [trial.milliseconds for trial in trials] == [3.0, 1.0, 2.0]
    assert tune.fastest(trials) == tune.Trial(MIDDLE, 1.0)


def test_of_equally_fast_candidates_the_first_is_chosen() -> None:
    trials = tune.try_candidates(case(block), timer_of({32: 2.0, 64: 1.0, 128: 1.0}))
    assert tune.fastest(trials) == tune.Trial(MIDDLE, 1.0)


def test_a_candidate_that_does_not_fit_on_the_device_is_rejected_and_said_to_be() -> None:
    def run(config: Config) -> Tensor:
        if config is SMALL:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return block(config)

    trials = tune.try_candidates(case(run), timer_of({64: 2.0, 128: 3.0}))
    assert trials[0].rejected.startswith("OutOfResources: out of resource: shared memory, Required: 300000")
    assert tune.fastest(trials) == tune.Trial(MIDDLE, 2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (torch.zeros(2), [x]), Outputs])
def test_a_candidate_whose_result_is_not_finite_is_rejected(wrap: Callable[[Tensor], object], value: float) -> None:
    def run(config: Config) -> object:
        return wrap(torch.tensor([1.0, value])) if config is SMALL else block(config)

    trials = tune.try_candidates(case(run), timer_of({64: 2.0, 128: 3.0}))
    assert trials[0].rejected == "the result is not finite"
    assert tune.fastest(trials) == tune.Trial(MIDDLE, 2.0)


def test_an_error_of_the_op_itself_is_raised() -> None:
    def run(_: Config) -> object:
        raise ValueError("x has shape [3]")

    with pytest.raises(ValueError, match="x has shape"):
        tune.try_candidates(case(run), timer_of({}))


def test_a_case_without_a_candidate_that_runs_keeps_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Config) -> object:
        raise OutOfResources(2, 1, "threads")

    assert tune.tune([case(run)], timer_of({})) == {}
    assert "op bucket: no candidate runs, the default stays" in capsys.readouterr().out


def test_a_tuned_table_is_what_serving_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(block, op="a"), case(block, op="a", bucket="long"), case(block, LARGE, op="b")]
    tuned = tune.tune(cases, timer_of({32: 3.0, 64: 1.0, 128: 2.0}))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "h100.json").write_text(configs.dump(tuned))
    monkeypatch.setattr(configs.resources, "files", lambda _: tmp_path)
    configs.table.cache_clear()
    try:
        read = configs.table("h100")
    finally:
        configs.table.cache_clear()
    assert read == {"a": {"bucket": MIDDLE, "long": MIDDLE}, "b": {"bucket": LARGE}}


def test_buckets_that_no_op_knows_are_an_error() -> None:
    cases = [case(block, op="a", bucket="short"), case(block, op="b", bucket="long")]
    tune.check_known({"a": {"short": SMALL}}, cases)
    with pytest.raises(ValueError, match=r"no op knows: a/long, c/short"):
        tune.check_known({"a": {"short": SMALL, "long": SMALL}, "c": {"short": SMALL}}, cases)


def test_the_ops_are_tuned_once_a_bucket() -> None:
    buckets = [(one.op, one.bucket) for one in ops.tuning_cases(torch.device("meta"))]
    assert len(buckets) == len(set(buckets))


@pytest.mark.parametrize("name", sorted(set(configs.GPU_CLASSES.values())))
def test_committed_tables_have_only_buckets_that_an_op_knows(name: str) -> None:
    tune.check_known(configs.table(name), ops.tuning_cases(torch.device("meta")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_tuner_refuses(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    command = [sys.executable, "-m", "patchclamp_kernels.tune", "--output", str(output)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not output.exists()
