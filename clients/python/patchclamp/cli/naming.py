"""Names that a command stores under: whether they may be taken from others, and what was."""

import argparse
from typing import Any

from patchclamp.cli.terminal import note
from patchclamp.errors import PatchclampError
from patchclamp.results import Artifact


def add_naming_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a command takes that stores an artifact; `naming_options` reads it."""
    parser.add_argument("--description")
    add_replace_argument(parser)


def naming_options(args: argparse.Namespace, *tags: str) -> dict[str, Any]:
    """Returns the options of a request that stores an artifact under these tags."""
    options = {} if args.description is None else {"description": args.description}
    return {**options, "tags": tags, "replace_tags": args.replace}


def add_replace_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replace", action="store_true", help="take the name from the artifact that has it, which stays stored"
    )


def note_stored(artifact: Artifact, remark: str = "") -> None:
    """Prints the tags that were another's, and what a result is stored as."""
    note_moved(artifact)
    tags = ", ".join(artifact.tags)
    note((f"stored as {tags} = {artifact.id}" if tags else f"stored without a name, as {artifact.id}") + remark)


def note_moved(artifact: Artifact) -> None:
    """Prints a line for each tag that was another's."""
    for tag, loser in artifact.replaced_tags.items():
        note(f"moved {tag} from {loser} (still stored)")


def replace_hint(args: argparse.Namespace, error: PatchclampError) -> str:
    """Returns what to do about a name that is taken, on a line of its own; "" for every other error."""
    taken = error.code == "ALREADY_EXISTS" and getattr(args, "replace", None) is False
    return "\n  --replace takes the name" if taken else ""
