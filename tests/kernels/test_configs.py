"""Which launch configuration an op gets: its own default, or what the table of the GPU's class says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from patchclamp_kernels import configs
from patchclamp_kernels.configs import Config, config_for

DEFAULT = Config({"BLOCK": 64})
TUNED = Config({"BLOCK": 128, "ROWS": 2}, num_warps=8, num_stages=3)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of the package, where tables are looked up."""
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(configs.resources, "files", lambda _: tmp_path)
    configs.table.cache_clear()
    configs.gpu_class.cache_clear()
    yield tmp_path
    configs.table.cache_clear()
    configs.gpu_class.cache_clear()


def name_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", ""),
        ("NVIDIA RTX A1000 Laptop GPU", ""),
        ("NVIDIA GeForce RTX 4090", ""),
    ],
)
@pytest.mark.usefixtures("package")
def test_the_class_of_a_gpu_is_a_word_of_its_name(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    name_the_gpu(monkeypatch, name)
    assert configs.gpu_class(0) == expected


def test_an_unknown_gpu_gets_the_default(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "tables" / "h100.json").write_text(configs.dump({"op": {"bucket": TUNED}}))
    name_the_gpu(monkeypatch, "NVIDIA GeForce RTX 4090")
    assert config_for("op", "bucket", DEFAULT, CUDA) is DEFAULT


@pytest.mark.usefixtures("package")
def test_a_class_without_a_table_gets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    name_the_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert config_for("op", "bucket", DEFAULT, CUDA) is DEFAULT


def test_a_cpu_gets_the_default(package: Path) -> None:
    (package / "tables" / "h100.json").write_text(configs.dump({"op": {"bucket": TUNED}}))
    assert config_for("op", "bucket", DEFAULT, torch.device("cpu")) is DEFAULT


def test_the_table_overrides_the_default_in_its_bucket_alone(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "tables" / "h100.json").write_text(configs.dump({"op": {"bucket": TUNED}}))
    name_the_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert config_for("op", "bucket", DEFAULT, CUDA) == TUNED
    assert config_for("op", "other", DEFAULT, CUDA) is DEFAULT
    assert config_for("other", "bucket", DEFAULT, CUDA) is DEFAULT


def test_a_table_survives_its_file() -> None:
    table = {"a": {"8 rows": TUNED, "1 row": DEFAULT}, "b": {"": Config()}}
    assert configs.load(configs.dump(table)) == table


def test_the_text_of_a_table_does_not_depend_on_the_order_of_tuning() -> None:
    one = {"a": {"x": TUNED, "y": DEFAULT}, "b": {"x": DEFAULT}}
    other = {"b": {"x": DEFAULT}, "a": {"y": DEFAULT, "x": TUNED}}
    assert configs.dump(one) == configs.dump(other)


def test_a_misspelt_field_of_a_table_is_an_error() -> None:
    with pytest.raises(TypeError, match="num_warp"):
        configs.load('{"op": {"bucket": {"blocks": {}, "num_warp": 4}}}')
