"""A server of the tiny llama with a vector, for examples that need one running."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client
from patchclamp_server.model.load import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """It has the vector `liking`, which adds something at both layers."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        with Client(server.address) as client:
            pairs = [("I love it.", "I hate it."), ("A good day.", "A bad day."), ("We won.", "We lost.")]
            client.extract_vectors(pairs, tags=["liking"]).result()
        yield server


@pytest.fixture
def examples() -> Path:
    return EXAMPLES
