"""patchclamp vectors extract | calibrate | detect | circuit | subspace | list | get | put | export | rm | tag"""

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from patchclamp.cli import calibrate, concept_circuit, detect, extract, subspace
from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.parser import count
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import heading, note, print_json, table
from patchclamp.names import ARTIFACT_FORMATS, ARTIFACT_KINDS, SITES, ArtifactFormatName, ArtifactKindName
from patchclamp.requests import UploadOptions
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.results import Artifact, DeletedArtifact
from patchclamp.torch_files import read_affine, read_lm_steer, read_loreft

_SUFFIXES: Mapping[str, ArtifactFormatName] = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".jsonl": "text_json_lines",
}
# A file that ends in .json is one of these: its content, or the artifact, says which.
_JSON: Mapping[str, ArtifactFormatName] = {
    "head_set": "head_score_json",
    "neuron_set": "neuron_set_json",
    "feature_labels": "feature_label_json",
}
# What a file of this format is by default; of any other, a vector.
_KINDS: Mapping[ArtifactFormatName, ArtifactKindName] = {
    "head_score_json": "head_set",
    "neuron_set_json": "neuron_set",
    "text_json_lines": "corpus",
    "saelens": "autoencoder",
    "gemma_scope_npz": "autoencoder",
    "feature_label_json": "feature_labels",
}


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

    put = actions.add_parser("put", parents=[connection_options()], help="store a file")
    put.add_argument("file", type=Path)
    put.add_argument("--name", help="tag to store it under")
    put.add_argument("--format", choices=ARTIFACT_FORMATS, help="default: by the file's suffix")
    put.add_argument(
        "--kind", choices=ARTIFACT_KINDS, help="default: by the content of JSON, corpus for .jsonl, else vector"
    )
    put.add_argument("--site", choices=SITES, help="site of a vector (default: resid_post)")
    put.add_argument(
        "--torch",
        choices=("loreft", "lm_steer", "affine"),
        help="what a file of PyTorch holds: a directory of pyreft, LM-Steer, or a linear layer",
    )
    put.add_argument("--layer", type=count, help="with --torch lm_steer or affine: where the map is applied")
    put.add_argument("--epsilon", type=float, help="with --torch lm_steer: the one that it was trained with")
    put.add_argument("--description")
    add_replace_argument(put)
    put.set_defaults(run=run_put)

    export = actions.add_parser("export", parents=[connection_options()], help="write an artifact to a file")
    export.add_argument("ref", help="id or tag")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    export.add_argument("--format", choices=ARTIFACT_FORMATS, help="default: by the file's suffix")
    export.add_argument("--layers", type=layer_list, default="all", help="for example 1-29 or 10,14; default: all")
    export.set_defaults(run=run_export)

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
    return _show(args, artifact)


def run_put(args: argparse.Namespace) -> int:
    if args.torch is not None:
        return _put_torch(args)
    format = args.format or _format_of(args.file, lambda: args.kind or _kind_of_json(args.file))
    kind: ArtifactKindName = args.kind or _KINDS.get(format, "vector")
    options: UploadOptions = {"kind": kind, "format": format}
    options.update(_label(args))  # type: ignore[typeddict-item]
    if args.site is not None:
        options["site"] = args.site
    with connect(args) as client:
        artifact = client.put_artifact(args.file, **options)
    return _show(args, artifact)


def _put_torch(args: argparse.Namespace) -> int:
    needed = {"loreft": (), "lm_steer": ("layer", "epsilon"), "affine": ("layer",)}[args.torch]
    for option in ("layer", "epsilon"):
        if (getattr(args, option) is not None) != (option in needed):
            what = "needs" if option in needed else "takes no"
            raise ValueError(f"--torch {args.torch} {what} --{option}")
    if args.kind is not None or args.format is not None:
        raise ValueError("--torch says the kind and the format; leave --kind and --format out")
    if args.torch == "loreft":
        if args.site is not None:
            raise ValueError("the files of pyreft say the site; leave --site out")
        file = read_loreft(args.file)
    elif args.torch == "lm_steer":
        file = read_lm_steer(args.file, layer=args.layer, epsilon=args.epsilon, site=args.site or "resid_post")
    else:
        file = read_affine(args.file, layer=args.layer, site=args.site or "resid_post")
    with connect(args) as client:
        artifact = client.put_artifact(
            file.data, kind=file.kind, site=file.site, provenance=file.provenance, **_label(args)
        )
    return _show(args, artifact)


def _label(args: argparse.Namespace) -> StoredOptions:
    """Returns the description and the tag that were given."""
    options: StoredOptions = {}
    if args.description is not None:
        options["description"] = args.description
    if args.name is not None:
        options["tags"] = [args.name]
        options["replace_tags"] = args.replace
    return options


def run_export(args: argparse.Namespace) -> int:
    layers = () if args.layers == "all" else args.layers
    with connect(args) as client:
        format = args.format or _format_of(args.output, lambda: client.get_artifact(args.ref).kind)
        data = client.download_artifact(args.ref, format, layers=layers)
    # Whole or not at all: a file that was there stays when the disk is full.
    partial = args.output.with_name(f"{args.output.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.replace(args.output)
    finally:
        partial.unlink(missing_ok=True)
    if args.json:
        print_json({"ref": args.ref, "file": str(args.output), "bytes": len(data)})
    else:
        note(f"{args.output}: {len(data)} bytes")
    return 0


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
            return _show(args, client.tag_artifact(args.tag, args.ref, replace=args.replace))
        client.untag_artifact(args.tag)
    if args.json:
        print_json({"removed": args.tag})
    else:
        note(f"removed the tag {args.tag}")
    return 0


def _show(args: argparse.Namespace, artifact: Artifact) -> int:
    if args.json:
        print_json(artifact)
        return 0
    note_moved(artifact)
    heading(", ".join(artifact.tags) or artifact.id)
    for name, value in artifact.to_dict().items():
        if name != "replaced_tags" and value not in ("", (), {}, 0):
            print(f"  {name:<18} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}")
    return 0


def _format_of(path: Path, kind: Callable[[], str]) -> ArtifactFormatName:
    """Returns the format that a name stands for. kind: what is in it, which is asked for where it is JSON."""
    if path.suffix == ".json":
        found = kind()
        if found not in _JSON:
            raise ValueError(f"{path}: JSON holds a {' or '.join(_JSON)}, not a {found}")
        return _JSON[found]
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: give --format, or a name that ends in {', '.join(_SUFFIXES)} or .json")
    return _SUFFIXES[path.suffix]


def _kind_of_json(path: Path) -> str:
    """Returns "head_set" or "neuron_set" by the first name in the file: "<layer>-<head>" or "<layer>"."""
    try:
        first = next(iter(json.loads(path.read_bytes())), "")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if re.fullmatch(r"\d+(-\d+)?", str(first)) is None:
        message = f'{path}: expected head scores {{"<layer>-<head>": [...]}} or neurons {{"<layer>": [...]}}'
        raise ValueError(f"{message}; else give --kind")
    return "head_set" if "-" in first else "neuron_set"


def _span(layers: tuple[int, ...]) -> str:
    """Returns "3-7" for a run of layers, else all of them."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers)) or "-"
