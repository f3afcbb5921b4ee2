"""One thread a process: tiny matrices on a shared machine only lose by more."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
