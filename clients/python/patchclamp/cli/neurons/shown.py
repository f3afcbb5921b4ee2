"""Sets of neurons in the terminal: the best in a table, and all layers as bars; and as a picture."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchclamp.cli.files import picture_file
from patchclamp.cli.naming import note_stored
from patchclamp.cli.terminal import note, quoted, table
from patchclamp.results import DecodedToken, StoredNeurons

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10


def add_picture_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--picture", type=picture_file, metavar="OUT.png", help=f"{what}; needs matplotlib")


def write_picture(args: argparse.Namespace, figure: "Figure") -> None:
    figure.savefig(args.picture)
    note(f"picture: {args.picture}")


def show_best(stored: StoredNeurons, what: str) -> None:
    """Prints the best neurons with their scores, and with their values where the set has any."""
    values = any(each.value is not None for each in stored.best)
    rows = [
        (each.neuron, f"{each.score:.4f}", *([f"{each.value:.4g}" if each.value is not None else ""] if values else []))
        for each in stored.best[:SHOWN]
    ]
    table(("neuron", what, *(["value"] if values else [])), rows)
    if stored.neurons > len(rows):
        print(f"and {stored.neurons - len(rows)} more, in {len(stored.layers)} layers")


def note_stored_set(stored: StoredNeurons) -> None:
    """Prints the tags that were another's, and what the set is stored as; a set of no neuron is not stored."""
    if not stored.artifact.id:
        note("no neuron: nothing is stored")
        return
    note_stored(stored.artifact)


def tokens_shown(tokens: Sequence[DecodedToken]) -> str:
    return " ".join(quoted(token.text) for token in tokens)
