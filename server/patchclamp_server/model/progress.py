"""Progress tells whoever waits for a model how far its fetching and loading have come."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import Any, Protocol, Self

import rich.progress
from rich.console import Console
from transformers.utils import logging as transformers_logging

# This is the time between two lines of a stage where there is no terminal.
LINE_SECONDS = 10.0


class Stage(Enum):
    """The value is what a person reads."""

    WAIT = "waiting for another process"
    DOWNLOAD = "download"
    VERIFY = "verify"
    CONVERT = "convert"
    TOKENIZER = "tokenizer"
    WRITE = "write"
    FINGERPRINT = "fingerprint"
    LOAD = "load"
    PREPARE = "prepare"
    READY = "ready"


class Progress(Protocol):
    """It is called often, on the working thread. What it raises stops the work and leaves no entry in the cache."""

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        """Reports `done` of `total` (None where it is unknown) bytes (DOWNLOAD, VERIFY, FINGERPRINT), tensors (CONVERT,
        LOAD), files (WRITE) or layers (PREPARE). READY comes once, when the model can be run."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        pass


class RichProgress:
    """Shows a bar for each stage on standard error; where that is no terminal, a line for each stage, and every
    `LINE_SECONDS` one with the share done. Use it as a context manager.

    >>> with RichProgress() as progress:
    ...     load_model("embedded", progress=progress)
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._bars = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
            console=self._console,
        )
        self._stage: Stage | None = None
        self._task: rich.progress.TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            if exc is None:
                self._finish_stage()
            self._bars.stop()

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        if not self._console.is_terminal:
            self._print_line(stage, done, total)
        elif stage is Stage.READY:
            self._finish_stage()
        else:
            if stage is not self._stage:
                self._finish_stage()
                self._task = self._bars.add_task(f"model: {stage.value}", total=total)
            if self._task is not None:
                self._bars.update(self._task, completed=done, total=total)
        self._stage = stage

    def _print_line(self, stage: Stage, done: int, total: int | None) -> None:
        now = self._clock()
        if stage is not self._stage:
            self._console.print(f"model: {stage.value}")
        elif total and now - self._last_line >= LINE_SECONDS:
            self._console.print(f"model: {stage.value} {done / total:.0%}")
        else:
            return
        self._last_line = now

    def _finish_stage(self) -> None:
        if self._task is not None:
            size = self._bars.tasks[self._bars.task_ids.index(self._task)].total or 1
            self._bars.update(self._task, total=size, completed=size)
            self._bars.stop_task(self._task)
            self._task = None


class _CountedItems:
    """Replaces a bar of transformers, and reports to a Progress instead."""

    def __init__(self, items: Iterable[Any], total: int | None, report: Callable[[int, int | None], None]) -> None:
        self._items = items
        self._total = total
        self._report = report

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._items):
            self._report(done, self._total)
            yield item


@contextmanager
def transformers_progress(progress: Progress | None, stage: Stage) -> Iterator[None]:
    """Reports the bars that transformers would draw over tensors as `stage`. With None it leaves them alone.

    The hook is global to the process, so models are loaded one after another.
    """
    if progress is None:
        yield
        return

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        items = args[0] if args else kwargs.get("iterable")
        if items is None:
            return factory(*args, **{**kwargs, "disable": True})
        total = kwargs.get("total", len(items) if hasattr(items, "__len__") else None)
        return _CountedItems(items, total, lambda done, size: progress.update(stage, done, size))

    from transformers import modeling_gguf_pytorch_utils

    progress.update(stage)
    previous = transformers_logging.set_tqdm_hook(hook)
    # The reader of most GGUF families draws its bar without that hook.
    gguf_reader: Any = modeling_gguf_pytorch_utils
    drawn = gguf_reader.tqdm
    gguf_reader.tqdm = lambda *args, **kwargs: hook(drawn, args, kwargs)
    try:
        yield
    finally:
        gguf_reader.tqdm = drawn
        transformers_logging.set_tqdm_hook(previous)
