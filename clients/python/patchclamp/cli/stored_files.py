"""patchclamp vectors put | export: which file holds what, and what is said of it."""

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from patchclamp.cli.naming import add_replace_argument, note_moved
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.parser import offset
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import heading, note, print_json
from patchclamp.names import ARTIFACT_FORMATS, ARTIFACT_KINDS, SITES, ArtifactFormatName, ArtifactKindName, SiteName
from patchclamp.requests import UploadOptions
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.results import Artifact
from patchclamp.torch_files import TorchFile, read_affine, read_lm_steer, read_loreft, read_vectors, write_vectors

_SUFFIXES: Mapping[str, ArtifactFormatName] = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".jsonl": "text_json_lines",
    ".tsv": "duo_attention_tsv",
    ".yaml": "qr_head_yaml",
    ".yml": "qr_head_yaml",
}
# Files of PyTorch are read and written here, and travel as safetensors.
_TORCH = (".pt", ".pth", ".bin")
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
    "duo_attention_tsv": "head_set",
    "qr_head_yaml": "head_set",
}
# The options that each kind of file of PyTorch takes besides --site, and whether it needs them.
_TORCH_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "vectors": {"layer": False, "entry": False, "layer_offset": False},
    "loreft": {},
    "lm_steer": {"layer": True, "epsilon": True},
    "affine": {"layer": True},
}


def add_parsers(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        choices=_TORCH_OPTIONS,
        help="what a file of PyTorch holds: vectors, a directory of pyreft, LM-Steer, or a linear layer",
    )
    put.add_argument(
        "--layer",
        type=layer_list,
        help="with --torch vectors: layers of one vector, or those to take; with lm_steer or affine: that of the map",
    )
    put.add_argument("--epsilon", type=float, help="with --torch lm_steer: the one that it was trained with")
    put.add_argument("--entry", help="with --torch vectors: the name under which they stand in the file")
    put.add_argument(
        "--layer-offset",
        type=offset,
        metavar="N",
        help="layers of a GGUF or --torch vectors are counted from here: -1 where 0 is the embedding (default: 0)",
    )
    put.add_argument(
        "--tensor",
        type=_tensor_name,
        action="append",
        metavar="NAME=TENSOR",
        help="what a tensor is called in safetensors, such as layer.3=vector or layer.3=stacked[3]; repeatable",
    )
    put.add_argument("--description")
    add_replace_argument(put)
    put.set_defaults(run=run_put)

    export = actions.add_parser("export", parents=[connection_options()], help="write an artifact to a file")
    export.add_argument("ref", help="id or tag")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    export.add_argument("--format", choices=ARTIFACT_FORMATS, help="default: by the file's suffix")
    export.add_argument("--layers", type=layer_list, default="all", help="for example 1-29 or 10,14; default: all")
    export.set_defaults(run=run_export)


def run_put(args: argparse.Namespace) -> int:
    if args.torch is not None:
        return _put_torch(args)
    format = args.format or _format_of(args.file, lambda: args.kind or _kind_of_json(args.file))
    kind: ArtifactKindName = args.kind or _KINDS.get(format, "vector")
    options: UploadOptions = {"kind": kind, "format": format}
    options.update(_label(args))  # type: ignore[typeddict-item]
    if args.site is not None:
        options["site"] = args.site
    if args.layer_offset is not None:
        options["layer_offset"] = args.layer_offset
    if args.tensor is not None:
        options["tensor_names"] = dict(args.tensor)
    for name in ("layer", "epsilon", "entry"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for --torch")
    with connect(args) as client:
        artifact = client.put_artifact(args.file, **options)
    return show_artifact(args, artifact)


def _put_torch(args: argparse.Namespace) -> int:
    if args.kind is not None or args.format is not None or args.tensor is not None:
        raise ValueError("--torch says what the file holds; leave --kind, --format and --tensor out")
    file = _torch_file(args)
    with connect(args) as client:
        artifact = client.put_artifact(
            file.data, kind=file.kind, site=file.site, provenance=file.provenance, **_label(args)
        )
    return show_artifact(args, artifact)


def _torch_file(args: argparse.Namespace) -> TorchFile:
    takes = _TORCH_OPTIONS[args.torch]
    for option in ("layer", "epsilon", "entry", "layer_offset"):
        given, name = getattr(args, option) is not None, option.replace("_", "-")
        if given and option not in takes:
            raise ValueError(f"--torch {args.torch} takes no --{name}")
        if not given and takes.get(option):
            raise ValueError(f"--torch {args.torch} needs --{name}")
    if args.torch == "loreft":
        if args.site is not None:
            raise ValueError("the files of pyreft say the site; leave --site out")
        return read_loreft(args.file)
    if args.torch == "vectors":
        layers = None if args.layer == "all" else args.layer
        return read_vectors(
            args.file, layer=layers, entry=args.entry, layer_offset=args.layer_offset or 0, site=args.site
        )
    if args.layer == "all" or len(args.layer) != 1:
        raise ValueError(f"--torch {args.torch} needs one --layer")
    site: SiteName = args.site or "resid_post"
    [layer] = args.layer
    if args.torch == "lm_steer":
        return read_lm_steer(args.file, layer=layer, epsilon=args.epsilon, site=site)
    return read_affine(args.file, layer=layer, site=site)


def _tensor_name(text: str) -> tuple[str, str]:
    name, equals, tensor = text.partition("=")
    if not (name and equals and tensor):
        raise argparse.ArgumentTypeError(f"expected NAME=TENSOR, such as layer.3=vector, got {text!r}")
    return name, tensor


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
    of_torch = args.format is None and args.output.suffix in _TORCH
    with connect(args) as client:
        if of_torch and (kind := client.get_artifact(args.ref).kind) != "vector":
            raise ValueError(f"{args.output}: a file of PyTorch holds a vector here, not a {kind}")
        format = args.format or (
            "safetensors" if of_torch else _format_of(args.output, lambda: client.get_artifact(args.ref).kind)
        )
        data = client.download_artifact(args.ref, format, layers=layers)
    # Whole or not at all: a file that was there stays when the disk is full.
    partial = args.output.with_name(f"{args.output.name}.{os.getpid()}.part")
    try:
        if of_torch:
            write_vectors(data, partial)
        else:
            partial.write_bytes(data)
        size = partial.stat().st_size
        partial.replace(args.output)
    finally:
        partial.unlink(missing_ok=True)
    if args.json:
        print_json({"ref": args.ref, "file": str(args.output), "bytes": size})
    else:
        note(f"{args.output}: {size} bytes")
    return 0


def show_artifact(args: argparse.Namespace, artifact: Artifact) -> int:
    if args.json:
        print_json(artifact)
        return 0
    note_moved(artifact)
    for warning in artifact.import_warnings:
        note(f"warning: {warning}")
    heading(", ".join(artifact.tags) or artifact.id)
    for name, value in artifact.to_dict().items():
        if name not in ("replaced_tags", "import_warnings") and value not in ("", (), {}, 0):
            print(f"  {name:<18} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}")
    return 0


def _format_of(path: Path, kind: Callable[[], str]) -> ArtifactFormatName:
    """Returns the format that a name stands for. kind: what is in it, which is asked for where it is JSON."""
    if path.suffix == ".json":
        found = kind()
        if found not in _JSON:
            raise ValueError(f"{path}: JSON holds a {' or '.join(_JSON)}, not a {found}")
        return _JSON[found]
    if path.suffix in _TORCH:
        raise ValueError(f"{path}: say with --torch what a file of PyTorch holds")
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
