"""Scores by layer as lines of text, for every terminal."""

from collections.abc import Iterator, Sequence

_WIDTH = 32


def layer_lines(layers: Sequence[int], largest: Sequence[float], mean: Sequence[float] = ()) -> Iterator[str]:
    """Yields a line for each layer: a bar as long as its largest score, dark up to the mean where there is one."""
    most = max(map(abs, largest), default=0.0)
    margin = max((len(str(layer)) for layer in layers), default=1) + 1
    for i, layer in enumerate(layers):
        bar = _cells(largest[i], most)
        dark = min(_cells(mean[i], most), bar) if mean else 0
        told = f"{largest[i]:.4g}" + (f", mean {mean[i]:.4g}" if mean else "")
        yield f"{f'L{layer}':>{margin}} |{('█' * dark + '▒' * (bar - dark)):<{_WIDTH}}| {told}"


def _cells(value: float, most: float) -> int:
    return int(_WIDTH * abs(value) / most + 0.5) if most else 0
