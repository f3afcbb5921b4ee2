"""What activation patching found: a cell for each site, layer and column, and heads where they were asked for."""

from dataclasses import dataclass, field

from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import activation_pb2 as pb

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PatchCell(Record):
    """Holds one patch; numbers are of all pairs together.

    positions: index into `PatchGrid.positions`. effect: share of the difference of the two runs, 0 nothing and 1 all of
    it; low, high: its 95 % interval. head: None for the site as a whole.
    """

    site: str
    layer: int
    positions: int
    metric: float
    effect: float
    low: float
    high: float
    head: int | None = None


@dataclass(frozen=True)
class PatchGrid(Record):
    """Holds the cells of a grid of sites, layers and positions.

    source_metric, unpatched_metric: of the runs that activations come from, and of those that they are put into.
    """

    cells: tuple[PatchCell, ...]
    source_metric: float
    unpatched_metric: float
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    requests: int
    warnings: tuple[str, ...]

    @property
    def heads(self) -> tuple[int, ...]:
        """Returns the heads that have cells of their own."""
        return tuple(sorted({cell.head for cell in self.cells if cell.head is not None}))

    def effects(self, site: str, head: int | None = None) -> Grid:
        """Returns the effects at a site as [layers][positions]. Raises ValueError where nothing was patched there."""
        found = {
            (cell.layer, cell.positions): cell.effect for cell in self.cells if (cell.site, cell.head) == (site, head)
        }
        if not found:
            heads = f", head {head}" if head is not None else ""
            raise ValueError(f"{site}{heads} was not patched; the sites are {', '.join(self.sites)}")
        return tuple(tuple(found[layer, i] for i in range(len(self.positions))) for layer in self.layers)

    def best(self, n: int = 10) -> tuple[PatchCell, ...]:
        """Returns the n cells with the largest effects in size."""
        return tuple(sorted(self.cells, key=lambda cell: -abs(cell.effect))[:n])


PatchEvent = Progress | PatchCell | PatchGrid


@dataclass
class PatchCollector:
    """Turns the messages of activation patching into events: the cells, then the grid."""

    cells: list[PatchCell] = field(default_factory=list)
    _result: PatchGrid | None = None

    def add(self, message: pb.PatchActivationsResponse) -> PatchEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "cell":
                self.cells.append(PatchCell.from_proto(message.cell))
                return self.cells[-1]
            case "result":
                self._result = PatchGrid.from_proto(message.result, cells=tuple(self.cells))
                return self._result
            case other:
                raise ValueError(f"activation patching sent an event this client does not know: {other}")

    def result(self) -> PatchGrid | None:
        """Returns the grid; None while it has not arrived."""
        return self._result
