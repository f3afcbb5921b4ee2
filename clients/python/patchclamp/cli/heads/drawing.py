"""Heat maps and needle grids as lines of text, for every terminal."""

from collections.abc import Iterator, Sequence

from patchclamp.results import NeedleGrid

_POSITIVE = " ░▒▓█"
_NEGATIVE = " -=%#"
# Above this many heads a cell is one character wide, so that a layer still fits on a line.
_WIDE_CELLS = 40


def heat_map_lines(matrix: Sequence[Sequence[float]], columns: str = "", layers: Sequence[int] = ()) -> Iterator[str]:
    """Yields a line for each layer with a cell for each head, or for whatever `columns` names.

    A cell shows the nearest quarter of the largest magnitude, in other characters below zero.
    """
    largest = max((abs(value) for row in matrix for value in row), default=0.0)
    width = 2 if len(matrix[0]) <= _WIDE_CELLS else 1
    named = layers or range(len(matrix))
    margin = len(str(max(named))) + 1
    yield f"{'':{margin}} {columns or f'head 0 to {len(matrix[0]) - 1}'}"
    for layer, row in zip(named, matrix, strict=True):
        cells = "".join(_shade(value, largest) * width for value in row)
        yield f"{f'L{layer}':>{margin}} |{cells}|"
    quarters = "  ".join(f"{_POSITIVE[i]} {largest * i / 4:.3g}" for i in range(1, 5))
    below = f"  below zero {_NEGATIVE[1:]}" if any(value < 0 for row in matrix for value in row) else ""
    yield f"{'':{margin}} {quarters}{below}"


def needle_grid_lines(grid: NeedleGrid) -> Iterator[str]:
    """Yields a table of successes of runs: the depths go down, the lengths across."""
    cells = [[f"{cell[0]}/{cell[1]}" if cell else "-" for cell in row] for row in grid.cells]
    widths = [max(len(text) for text in column) for column in zip(map(str, grid.lengths), *cells, strict=True)]
    header = "  ".join(f"{length:>{width}}" for length, width in zip(grid.lengths, widths, strict=True))
    yield f"depth  {header}  tokens"
    for depth, row in zip(grid.depths, cells, strict=True):
        yield f"{depth:>5.2f}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def _shade(value: float, largest: float) -> str:
    level = int(4 * abs(value) / largest + 0.5) if largest else 0
    return (_POSITIVE if value > 0 else _NEGATIVE)[level]
