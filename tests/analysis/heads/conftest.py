"""Models of this folder: the embedded one, which can answer, and the tiny one of tests/conftest.py, which cannot."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    return load_model("embedded")


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(str(tiny_llama_dir))


@pytest.fixture(scope="session")
def embedded_engine(embedded: LoadedModel) -> Iterator[Engine]:
    """One for all tests that leave nothing in it."""
    engine = Engine(embedded)
    engine.start()
    yield engine
    engine.shutdown()
