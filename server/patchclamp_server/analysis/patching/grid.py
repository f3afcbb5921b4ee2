"""What activation patching is asked: pairs of prompts, and a grid of sites, layers and groups of positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from patchclamp_server.interventions.program import PositionRange
from patchclamp_server.model.sites import Site


class Direction(Enum):
    """The names of the enum PatchDirection, in lower case and without its prefix."""

    RESTORE = "restore"
    CORRUPT = "corrupt"


class Metric(Enum):
    """The names of the enum PatchMetric, in lower case and without its prefix."""

    LOG_PROBABILITY_DIFFERENCE = "log_probability_difference"
    LOG_PROBABILITY = "log_probability"
    DIVERGENCE = "divergence"


@dataclass(frozen=True)
class Pair:
    """Token ids of two prompts, and of what continues each of them; a metric that needs no answer has none."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    other_answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Column:
    """Tokens that are patched together."""

    name: str
    positions: PositionRange

    def of(self, length: int) -> range:
        """Returns the positions in a prompt of that length. They may lie outside of it, or be none."""
        start, end = self.positions.start, self.positions.end
        first = start if start >= 0 else length + start
        if end is None or (end == 0 and start < 0):
            return range(first, length)
        return range(first, end if end >= 0 else length + end)


@dataclass(frozen=True)
class Cell:
    """One patch: a column at the layers around `layer`, of one head where it has one."""

    site: Site
    layer: int
    column: int
    head: int | None = None


@dataclass(frozen=True)
class Patching:
    """Cells patch `window` neighbouring layers. Columns select equally many tokens of both prompts of every pair."""

    pairs: tuple[Pair, ...]
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    columns: tuple[Column, ...]
    direction: Direction = Direction.RESTORE
    metric: Metric = Metric.LOG_PROBABILITY_DIFFERENCE
    window: int = 1
    by_head: bool = False
    seed: int = 0

    def cells(self, n_heads: int) -> Iterator[Cell]:
        for site in self.sites:
            heads = (None, *range(n_heads)) if self.by_head and site is Site.ATTN_Z else (None,)
            for layer in self.layers:
                for column in range(len(self.columns)):
                    yield from (Cell(site, layer, column, head) for head in heads)

    def around(self, layer: int, n_layers: int) -> tuple[int, ...]:
        """Returns the layers of a cell: of an even number of them, one more comes after `layer` than before."""
        first = layer - (self.window - 1) // 2
        return tuple(range(max(0, first), min(n_layers, first + self.window)))

    def source_and_target(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the prompt whose activations are taken, and the one that they are put into."""
        return (pair.clean, pair.corrupt) if self.direction is Direction.RESTORE else (pair.corrupt, pair.clean)
