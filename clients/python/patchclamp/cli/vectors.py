"""patchclamp vectors extract | calibrate | detect | circuit | subspace | list | get | put | export | rm | tag"""

import argparse

from patchclamp.cli import calibrate, concept_circuit, detect, extract, stored_files, subspace
from patchclamp.cli.naming import add_replace_argument
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.stored_files import show_artifact
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.names import ARTIFACT_KINDS
from patchclamp.results import DeletedArtifact


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("vectors", help="find, store and move steering vectors and other artifacts")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    extract.add_parser(actions)
    calibrate.add_parser(actions)
    detect.add_parser(actions)
    concept_circuit.add_parser(actions)
    subspace.add_parser(actions)

    listing = actions.add_parser("list", parents=[connection_options()], help="what is stored")
    listing.add_argument("--kind", choices=ARTIFACT_KINDS, help="default: every kind")
    listing.set_defaults(run=run_list)

    get = actions.add_parser("get", parents=[connection_options()], help="one artifact with its evidence")
    get.add_argument("ref", help="id or tag")
    get.set_defaults(run=run_get)

    stored_files.add_parsers(actions)

    remove = actions.add_parser("rm", parents=[connection_options()], help="delete artifacts and their tags")
    remove.add_argument("refs", nargs="+", metavar="ref", help="id or tag")
    remove.set_defaults(run=run_remove)

    tag = actions.add_parser("tag", parents=[connection_options()], help="point a tag at an artifact, or remove it")
    tag.add_argument("tag")
    target = tag.add_mutually_exclusive_group(required=True)
    target.add_argument("ref", nargs="?", help="id or another tag")
    target.add_argument("--remove", action="store_true")
    add_replace_argument(tag)
    tag.set_defaults(run=run_tag)


def run_list(args: argparse.Namespace) -> int:
    with connect(args) as client:
        artifacts = list(client.list_artifacts(args.kind))
    if args.json:
        print_json(artifacts)
    else:
        rows = [
            (",".join(a.tags) or "-", a.kind, a.site or "-", _span(a.layers), a.created[:19], a.id) for a in artifacts
        ]
        table(("tags", "kind", "site", "layers", "created", "id"), rows)
    return 0


def run_get(args: argparse.Namespace) -> int:
    with connect(args) as client:
        artifact = client.get_artifact(args.ref)
    return show_artifact(args, artifact)


def run_remove(args: argparse.Namespace) -> int:
    deleted: list[DeletedArtifact] = []
    try:
        with connect(args) as client:
            for ref in args.refs:
                deleted.append(client.delete_artifact(ref))
    finally:
        # Also what went before one that was refused.
        if args.json:
            print_json({"deleted": deleted})
        else:
            for each in deleted:
                note(f"deleted {each.id} ({', '.join(each.tags) or 'no tags'})")
    return 0


def run_tag(args: argparse.Namespace) -> int:
    with connect(args) as client:
        if not args.remove:
            return show_artifact(args, client.tag_artifact(args.tag, args.ref, replace=args.replace))
        client.untag_artifact(args.tag)
    if args.json:
        print_json({"removed": args.tag})
    else:
        note(f"removed the tag {args.tag}")
    return 0


def _span(layers: tuple[int, ...]) -> str:
    """Returns "3-7" for a run of layers, else all of them."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers)) or "-"
