"""Activation patching as heat maps: a panel for each site, layers x positions; heads as layers x heads."""

from typing import TYPE_CHECKING

from patchclamp.pictures.figure import new_figure
from patchclamp.results import PatchGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_INCHES_A_CELL = 0.3
_MOST_TICKS = 40


def patching_figure(grid: PatchGrid, title: str) -> "Figure":
    """Draws the effects of each site, layer 0 at the bottom, in colours that part at 0 and reach from -1 to 1 at least.

    Where heads were patched, a further row has a panel of layers x heads for each column of positions.
    """
    heads = grid.heads
    panels = [(site, grid.effects(site), grid.positions, "positions") for site in grid.sites]
    for i, name in enumerate(grid.positions if heads else ()):
        of_heads = [grid.effects("attn_z", head) for head in heads]
        rows = tuple(tuple(own[layer][i] for own in of_heads) for layer in range(len(grid.layers)))
        panels.append((f"heads at {name}", rows, tuple(map(str, heads)), "head"))
    largest = max(1.0, *(abs(cell.effect) for cell in grid.cells))
    widths = [max(len(columns), 4) for _, _, columns, _ in panels]
    figure = new_figure(2 + _INCHES_A_CELL * sum(widths) + 0.6 * len(panels), 2 + _INCHES_A_CELL * len(grid.layers))
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for each, (name, rows, columns, what) in zip(axes, panels, strict=True):
        image = _panel(each, rows, columns, largest)
        each.set_title(name)
        each.set_xlabel(what)
        each.set_yticks(*_ticks(tuple(map(str, grid.layers))))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes.tolist(), label="share of the difference of the runs")
    return figure


def _panel(axes: "Axes", rows: tuple[tuple[float, ...], ...], columns: tuple[str, ...], largest: float) -> "AxesImage":
    image = axes.imshow(
        [list(row) for row in rows], origin="lower", aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest
    )
    at, names = _ticks(columns)
    axes.set_xticks(at, names, rotation=90 if any(len(name) > 2 for name in names) else 0)
    return image


def _ticks(names: tuple[str, ...]) -> tuple[list[int], list[str]]:
    step = -(-len(names) // _MOST_TICKS)
    at = list(range(0, len(names), step))
    return at, [names[i] for i in at]
