"""`patchclamp serve` whose forward passes fail when a signal says so: what no production server has an option for.

SIGRTMIN      the next step raises
SIGRTMIN + 1  the next step asks the allocator for more than there is
SIGRTMIN + 2  every step raises from now on
SIGRTMIN + 3  the device is lost in the next step
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from faulty_executor import FaultyExecutor, allocate_too_much

from patchclamp_server.cli.commands import serve
from patchclamp_server.cli.options import add_serve_arguments
from patchclamp_server.engine.memory.plan import MemoryPlan
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc import server
from patchclamp_server.rpc.config import ServerConfig


def defect() -> NoReturn:
    raise ValueError("a defect")


def lost_device() -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Faults:
    """What the next steps meet. Set by signals on the main thread, met on the engine's."""

    def __init__(self) -> None:
        self._next: Callable[[], None] | None = None
        self._always = False

    def listen(self) -> None:
        for offset, fault in enumerate((defect, allocate_too_much, defect, lost_device)):
            signal.signal(signal.SIGRTMIN + offset, lambda *_, o=offset, f=fault: self._set(f, always=o == 2))

    def _set(self, fault: Callable[[], None], *, always: bool) -> None:
        self._next, self._always = fault, always

    def meet(self, _: int) -> None:
        fault = self._next
        if fault is not None:
            if not self._always:
                self._next = None
            fault()


class FaultyServer(server.Server):
    def __init__(self, model: LoadedModel, config: ServerConfig, plan: MemoryPlan | None = None) -> None:
        super().__init__(model, config, plan)
        faults = Faults()
        faults.listen()
        self.engine.runner.executor = FaultyExecutor(self.engine.executor, faults.meet)


def main() -> int:
    parser = argparse.ArgumentParser(prog="faulty-server")
    add_serve_arguments(parser)
    # The command line makes the server of this name.
    server.Server = FaultyServer  # type: ignore[misc]
    return serve(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
