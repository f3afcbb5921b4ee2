"""Runs the tasks of a benchmark in processes of their own, so that a crash or a hang loses one task and no more.

An illegal access on a device leaves the process unable to use it: the next task gets a new one. Every task is a
generator of (section, row); its rows arrive as they are made, so that what was measured before a crash is kept.
"""

import importlib
import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

Emit = Callable[[str, dict[str, object]], None]


@dataclass(frozen=True)
class Task:
    """The generator `function` of `module`, called with `arguments`; stopped after `seconds`, if it runs apart."""

    name: str
    module: str
    function: str
    arguments: tuple[Any, ...]
    seconds: float

    def run(self) -> Iterator[tuple[str, dict[str, object]]]:
        yield from getattr(importlib.import_module(self.module), self.function)(*self.arguments)


def run_inline(tasks: Sequence[Task], emit: Emit) -> dict[str, str]:
    """In this process, one after the other. Errors by task."""
    errors = {}
    for task in tasks:
        try:
            for section, row in task.run():
                emit(section, row)
        except Exception:
            errors[task.name] = traceback.format_exc()
    return errors


def run_apart(tasks: Sequence[Task], emit: Emit, *, workers: int, fresh: bool = False) -> dict[str, str]:
    """`workers` at a time; a process takes the next task when it is done, unless `fresh`. Errors by task."""
    pending, errors, running = deque(tasks), {}, []
    while pending or running:
        while pending and len(running) < workers:
            running.append(_Worker(pending.popleft()))
        ready = wait([w.connection for w in running], timeout=1.0)
        for worker in list(running):
            ended = None
            if worker.connection in ready:
                ended = worker.receive(emit)
            elif time.monotonic() > worker.deadline:
                ended = f"stopped after {worker.task.seconds:.0f} s"
                worker.process.kill()
            if ended is None:
                continue
            if ended:
                errors[worker.task.name] = ended
            if ended or fresh or not pending:
                worker.close()
                running.remove(worker)
            else:
                worker.give(pending.popleft())
    return errors


class _Worker:
    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.give(task)

    def give(self, task: Task) -> None:
        self.task = task
        self.deadline = time.monotonic() + task.seconds
        self.connection.send(task)

    def receive(self, emit: Emit) -> str | None:
        """None while the task goes on; then its error, "" for none."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(timeout=10)
            return f"the process ended with exit status {self.process.exitcode}"
        if kind == "row":
            emit(*content)
            return None
        return content[0]

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()


def _work(connection: Connection) -> None:
    from gpu.bootstrap import bootstrap

    bootstrap()
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        try:
            for section, row in task.run():
                connection.send(("row", section, row))
        except BaseException:
            connection.send(("end", traceback.format_exc()))
        else:
            connection.send(("end", ""))
