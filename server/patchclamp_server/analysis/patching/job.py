"""Activation patching: one prompt of a pair runs with single activations of the other, for every cell of a grid.

The run that activations come from is captured once for each pair. Every cell is then an ordinary request of low
priority, under a program with one edit of the kind `patch` whose source is that capture (Vig et al. 2020; Meng et al.
2022, causal tracing; Heimersheim & Nanda 2024, How to use and interpret activation patching).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.patching.effects import check_difference, drawn_counts, effects, has_both_signs
from patchclamp_server.analysis.patching.grid import Cell, Metric, Pair, Patching
from patchclamp_server.analysis.patching.measuring import Part, capturing, parts_of
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import Make, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.divergence import Reference
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.request import Event, Reduction
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.kinds.patch import Patch, SourceRows
from patchclamp_server.interventions.program import Edit, Program
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

# By pair, in nats: effects that are shares of less are told with a warning.
SMALL_DIFFERENCE = 0.1


@dataclass(frozen=True)
class CellEffect:
    """`metric` is the mean over the pairs."""

    cell: Cell
    metric: float
    effect: float
    low: float
    high: float


@dataclass(frozen=True)
class Patched:
    job: Patching
    source_metric: float
    unpatched_metric: float
    requests: int
    warnings: tuple[str, ...]


async def patch_activations(engine: Engine, job: Patching) -> AsyncGenerator[Progress | CellEffect | Patched, None]:
    """Yields progress, then every cell in the order of the grid, then the result.

    Raises InvalidArgument for pairs whose runs do not differ, before any cell is run.
    """
    info = engine.model.info
    cells = tuple(job.cells(info.n_heads))
    each = 2 if job.metric is Metric.LOG_PROBABILITY_DIFFERENCE else 1
    # Beside the cells: both runs without a patch, and the capture.
    steps = Steps("runs", len(job.pairs) * (2 * each + 1 + each * len(cells)))
    plain: list[float] = []
    async with aclosing(_numbers(engine, _unpatched(job))) as values:
        async for number in values:
            plain.append(number)
            yield steps.advance()
    source, unpatched = _of_parts(plain, job, each)
    check_difference(source, unpatched)
    patched = torch.zeros(len(job.pairs), len(cells), dtype=torch.float64)
    for i, pair in enumerate(job.pairs):
        sources, prediction = await _captured(engine, job, pair)
        yield steps.advance()
        numbers: list[float] = []
        async with aclosing(_numbers(engine, _patched(info, job, pair, cells, sources, prediction))) as values:
            async for number in values:
                numbers.append(number)
                yield steps.advance()
        patched[i] = torch.tensor(numbers, dtype=torch.float64).view(len(cells), each).sum(1)
    counts = drawn_counts(len(job.pairs), job.seed)
    found = await asyncio.to_thread(effects, patched, source, unpatched, counts)
    columns = (patched.mean(0), found.effect, found.low, found.high)
    for cell, *measured in zip(cells, *(column.tolist() for column in columns), strict=True):
        yield CellEffect(cell, *measured)
    warnings = _warnings(job, source, unpatched, counts)
    yield Patched(job, float(source.mean()), float(unpatched.mean()), steps.done, warnings)


async def _numbers(engine: Engine, parts: Iterator[Part]) -> AsyncGenerator[float, None]:
    """Yields what each request adds to its metric, in order."""
    reads: list[Callable[[list[Event]], float]] = []

    def makes() -> Iterator[Make]:
        for part in parts:
            reads.append(part.read)
            yield part.make

    async with aclosing(completed(engine, makes())) as finished:
        index = 0
        async for events in finished:
            yield reads[index](events)
            index += 1


def _unpatched(job: Patching) -> Iterator[Part]:
    """Yields the requests of all runs without a patch, for each pair first those of the source."""
    for pair in job.pairs:
        source, target = job.source_and_target(pair)
        prediction = Reference(len(source))
        if job.metric is Metric.DIVERGENCE:
            yield Part(capturing(source, (), prediction), lambda events: 0.0)
        else:
            yield from parts_of(job.metric, pair, source, None, prediction)
        yield from parts_of(job.metric, pair, target, None, prediction)


def _of_parts(numbers: list[float], job: Patching, each: int) -> tuple[Tensor, Tensor]:
    metrics = torch.tensor(numbers, dtype=torch.float64).view(len(job.pairs), 2, each).sum(2)
    return metrics[:, 0], metrics[:, 1]


async def _captured(engine: Engine, job: Patching, pair: Pair) -> tuple[dict[Site, SourceRows], Reference]:
    """Returns the rows of the source run at every site of the grid, and what the run predicts."""
    info, (prompt, _) = engine.model.info, job.source_and_target(pair)
    layers = tuple(sorted({each for layer in job.layers for each in job.around(layer, info.n_layers)}))
    kept = {site: KeptRows(layers) for site in job.sites}
    prediction = Reference(len(prompt))
    reductions = tuple(Reduction(site, reducer) for site, reducer in kept.items())
    async with aclosing(completed(engine, [capturing(prompt, reductions, prediction)])) as finished:
        async for _ in finished:
            pass
    positions = torch.arange(len(prompt))
    sources = {
        site: SourceRows(positions, len(prompt), {layer: reducer.rows(layer).cpu() for layer in layers})
        for site, reducer in kept.items()
    }
    return sources, prediction


def _patched(
    info: ModelInfo,
    job: Patching,
    pair: Pair,
    cells: tuple[Cell, ...],
    sources: dict[Site, SourceRows],
    prediction: Reference,
) -> Iterator[Part]:
    source, target = job.source_and_target(pair)
    for cell in cells:
        column = job.columns[cell.column]
        map_ = tuple(zip(column.of(len(target)), column.of(len(source)), strict=True))
        layers = job.around(cell.layer, info.n_layers)
        program = cell_program(info, cell, layers, sources[cell.site], map_)
        yield from parts_of(job.metric, pair, target, program, prediction)


def cell_program(
    info: ModelInfo, cell: Cell, layers: tuple[int, ...], source: SourceRows, positions: tuple[tuple[int, int], ...]
) -> BoundProgram:
    """Returns the program that makes one cell of one pair."""
    kind = Patch(source=source, positions=positions, heads=() if cell.head is None else (cell.head,))
    return bind(Program((Edit(kind, cell.site, "patch", layers=layers),)), info)


def _warnings(job: Patching, source: Tensor, unpatched: Tensor, counts: Tensor) -> tuple[str, ...]:
    warnings = []
    unequal = sum(len(pair.clean) != len(pair.corrupt) for pair in job.pairs)
    if unequal:
        warnings.append(
            f"{unequal} of {len(job.pairs)} pairs have prompts of unequal length: activations go to the position that "
            "the column names in each of them, whatever stands there"
        )
    difference = float((source - unpatched).mean())
    if abs(difference) < SMALL_DIFFERENCE:
        warnings.append(f"the runs differ by {difference:.4f} nats only, of which effects are shares")
    if has_both_signs(source, unpatched, counts):
        warnings.append("which run has the larger metric differs from draw to draw of the pairs: mind the intervals")
    return tuple(warnings)
