"""Head scores as a heat map of layers x heads, and needle tests as a grid of length x depth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchclamp.pictures.figure import new_figure
from patchclamp.results import NeedleGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES_A_CELL = 0.25


def heat_map_figure(matrix: Sequence[Sequence[float]], title: str) -> "Figure":
    """Draws scores [layers][heads], layer 0 at the bottom. Scores below zero get colours that part at zero."""
    layers, heads = len(matrix), len(matrix[0])
    largest = max(abs(value) for row in matrix for value in row) or 1.0
    signed = any(value < 0 for row in matrix for value in row)
    figure = new_figure(3 + _INCHES_A_CELL * heads, 2 + _INCHES_A_CELL * layers)
    axes = figure.add_subplot()
    image = axes.imshow(
        [list(row) for row in matrix],
        origin="lower",
        cmap="RdBu_r" if signed else "magma",
        vmin=-largest if signed else 0.0,
        vmax=largest,
    )
    axes.set_title(title)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes)
    return figure


def needle_grid_figure(grid: NeedleGrid, title: str) -> "Figure":
    """Draws the share of needles found, with successes/runs in each cell; the start of the haystack is at the top."""
    figure = new_figure(3 + len(grid.lengths), 2 + 0.6 * len(grid.depths))
    axes = figure.add_subplot()
    shares = [[cell[0] / cell[1] if cell else float("nan") for cell in row] for row in grid.cells]
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
    for row, cells in enumerate(grid.cells):
        for column, cell in enumerate(cells):
            if cell:
                axes.text(column, row, f"{cell[0]}/{cell[1]}", ha="center", va="center")
    axes.set_title(title)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the needle")
    axes.set_xticks(range(len(grid.lengths)), [str(length) for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [f"{depth:.2f}" for depth in grid.depths])
    figure.colorbar(image, ax=axes, label="share found")
    return figure
