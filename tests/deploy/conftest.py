"""What a server exports, asked once."""

import pytest
from exported import exported_names
from live import LiveServer


@pytest.fixture(scope="session")
def exported(live_server: LiveServer) -> set[str]:
    """Names of the series of a server."""
    return exported_names(live_server.metrics())
