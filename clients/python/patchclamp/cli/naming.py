"""Names that a command stores under: whether they may be taken from others, and what was."""

import argparse

from patchclamp.cli.terminal import note
from patchclamp.errors import PatchclampError
from patchclamp.results import Artifact


def add_replace_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replace", action="store_true", help="take the name from the artifact that has it, which stays stored"
    )


def note_moved(artifact: Artifact) -> None:
    """A line for each tag that was another's."""
    for tag, loser in artifact.replaced_tags.items():
        note(f"moved {tag} from {loser} (still stored)")


def replace_hint(args: argparse.Namespace, error: PatchclampError) -> str:
    """What to do about a name that is taken, on a line of its own; "" for every other error."""
    taken = error.code == "ALREADY_EXISTS" and getattr(args, "replace", None) is False
    return "\n  --replace takes the name" if taken else ""
