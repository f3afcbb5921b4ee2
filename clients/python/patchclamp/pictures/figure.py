"""An empty figure. matplotlib is imported here and nowhere else at run time."""

from typing import TYPE_CHECKING

from patchclamp.extras import install_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


class MissingMatplotlib(ImportError):
    """Says what to install."""

    def __init__(self) -> None:
        super().__init__(f"pictures need matplotlib: {install_line('plot')}", name="matplotlib")


def require_matplotlib() -> None:
    """Raises MissingMatplotlib when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MissingMatplotlib from None


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of this size in inches. No display is needed: savefig draws into the file."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
