"""Fixtures of every package: the real embedded model, and a tiny one of random weights; and which tests run."""

import os

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

# Of pytest-xdist: there is one for each core.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
configure_threads()
keep_compiled_code()

import torch

# Kernels run in Triton's interpreter where there is no GPU; Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import Phase, settings
from sampling import split
from tiny_llama import save_tiny_llama

from patchclamp_server.model.embedded import embedded_file
from patchclamp_server.model.gguf.conversion import converted_gguf
from patchclamp_server.model.progress import RichProgress

if TYPE_CHECKING:
    from live import LiveServer
    from small_autoencoder import SmallAutoencoder

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None)
# For mutants.py, which asks only whether there is a failure.
settings.register_profile("unshrunk", deadline=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("patchclamp")
    group.addoption("--all", action="store_true", help="every case of the widest products of parameters")
    group.addoption("--seed", type=int, default=0, help="of the sample of them that is drawn without --all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "drawn(share): its cases are many and alike; a share of them is drawn by --seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        items[:], left_out = split(items, config.getoption("--seed"))
        if left_out:
            config.hook.pytest_deselected(items=left_out)


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--seed")
    return (
        "all cases" if config.getoption("--all") else f"a sample of the widest products, by --seed {seed} (--all: all)"
    )


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded model for the oracle, dequantised by transformers; the first run that needs it fetches and converts
    it into the user's own cache."""
    with RichProgress() as progress:
        return converted_gguf(embedded_file(progress), progress)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers and width 32 with random weights, and a tokenizer of one token a byte."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    save_tiny_llama(directory)
    return directory


@pytest.fixture(scope="session")
def live_server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LiveServer]":
    """A real server of the tiny llama on an ephemeral port, shared by every test that changes nothing in it."""
    from live import LiveServer

    from patchclamp_server.model.load import load_model

    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LiveServer]":
    """A real server of the embedded model, for every test that needs one."""
    from live import LiveServer

    from patchclamp_server.model.load import load_model

    with LiveServer(load_model("embedded"), tmp_path_factory.mktemp("embedded_artifacts")) as server:
        yield server


@pytest.fixture(scope="session")
def small_autoencoder(embedded_server: "LiveServer") -> "SmallAutoencoder":
    """An autoencoder of 256 features, trained on activations of the embedded model."""
    from small_autoencoder import trained

    return trained(embedded_server.model)


@pytest.fixture
def channel(live_server: "LiveServer") -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(live_server.address) as channel:
        yield channel
