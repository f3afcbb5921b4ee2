"""One thread a process: tiny matrices on a shared machine only lose by more. Kernels run their torch references."""

from collections.abc import Iterator

import pytest
import torch

from patchclamp_kernels.runtime import reference_only


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield
