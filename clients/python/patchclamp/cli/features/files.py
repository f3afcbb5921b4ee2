"""patchclamp features import | export | label"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from patchclamp.autoencoders import autoencoder_file
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.parser import seed
from patchclamp.cli.terminal import note, print_json
from patchclamp.names import SITES
from patchclamp.results import Artifact


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    put = actions.add_parser(
        "import",
        parents=[connection_options(timeout=math.inf)],
        help="store an autoencoder of SAELens or Gemma Scope",
    )
    put.add_argument("path", type=Path, help="directory or weights of SAELens, or params.npz of Gemma Scope")
    put.add_argument("--name", help="tag to store it under")
    put.add_argument("--site", choices=SITES, help="where it reads, which params.npz does not say")
    put.add_argument("--layer", type=seed, metavar="N", help="the layer, which params.npz does not say")
    add_naming_arguments(put)
    put.set_defaults(run=run_import)

    export = actions.add_parser(
        "export", parents=[connection_options(timeout=math.inf)], help="write an autoencoder as SAELens reads it"
    )
    export.add_argument("autoencoder", help="id or tag")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")
    export.set_defaults(run=run_export)

    label = actions.add_parser("label", parents=[connection_options()], help="store names of features")
    label.add_argument("file", type=Path, help='JSON: {"<feature>": "name", ...}')
    label.add_argument("--of", required=True, metavar="AUTOENCODER", help="id or tag of the autoencoder")
    label.add_argument("--name", help="tag to store them under")
    add_naming_arguments(label)
    label.set_defaults(run=run_label)


def run_import(args: argparse.Namespace) -> int:
    path, options = autoencoder_file(args.path, site=args.site, layer=args.layer)
    with connect(args) as client:
        artifact = client.put_artifact(path, timeout=args.timeout, **{**options, **_naming(args)})
    return _stored(args, artifact, f"{artifact.site} of layer {artifact.layers[0]}, width {artifact.width}")


def run_export(args: argparse.Namespace) -> int:
    with connect(args) as client:
        directory = client.export_autoencoder(args.autoencoder, timeout=args.timeout).save(args.output)
    if args.json:
        print_json({"autoencoder": args.autoencoder, "directory": str(directory)})
    else:
        note(f"{directory}: {', '.join(sorted(each.name for each in directory.iterdir()))}")
    return 0


def run_label(args: argparse.Namespace) -> int:
    count = len(json.loads(args.file.read_bytes()))
    with connect(args) as client:
        artifact = client.put_artifact(
            args.file, kind="feature_labels", format="feature_label_json", of=args.of, **_naming(args)
        )
    return _stored(args, artifact, f"{count} names of features of {args.of}")


def _naming(args: argparse.Namespace) -> dict[str, Any]:
    return naming_options(args, *(() if args.name is None else (args.name,)))


def _stored(args: argparse.Namespace, artifact: Artifact, what: str) -> int:
    if args.json:
        print_json(artifact)
    else:
        print(what)
        note_stored(artifact, args.name or "no name")
    return 0
