"""patchclamp activations read"""

import argparse
import json
import math
from pathlib import Path

from patchclamp import requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_stored
from patchclamp.cli.neurons.selection import add_layers_argument, layers_of
from patchclamp.cli.neurons.texts import add_text_arguments, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count
from patchclamp.cli.steering import add_steering_arguments, program_of
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import ACTIVATION_REDUCTIONS, SITES
from patchclamp.programs import last
from patchclamp.results import ActivationRows, ReadActivations

_TYPES = ("float32", "float16", "bfloat16")
_STORED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_INDICES = {"text": "texts", "position": "positions", "token": "token_ids", "length": "lengths"}


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    read = actions.add_parser(
        "read", parents=[connection_options(timeout=math.inf)], help="read activations of texts, row by row or reduced"
    )
    read.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="each read whole, in the place of --texts, --corpus and --data, which are read in windows",
    )
    add_text_arguments(read, required=False)
    read.add_argument("--site", choices=SITES, action="append", help="repeatable (default: resid_post)")
    add_layers_argument(read)
    read.add_argument("--last", type=count, metavar="K", help="only the last K tokens of each text")
    read.add_argument("--reduction", choices=ACTIVATION_REDUCTIONS, help="default: none, every row")
    read.add_argument("--dtype", choices=_TYPES, help="of the rows (default: float32)")
    output = read.add_mutually_exclusive_group()
    output.add_argument(
        "--out", type=Path, metavar="FILE.safetensors", help="write the rows as an activations artifact"
    )
    output.add_argument("--name", help="store the rows on the server under this tag")
    add_naming_arguments(read)
    add_detach_argument(read)
    add_steering_arguments(read)
    add_model_argument(read)
    read.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if bool(args.prompts) == any(getattr(args, name) is not None for name in ("texts", "corpus", "data")):
        raise ValueError("give prompts, or one of --texts, --corpus and --data")
    options = {
        **given(args, "reduction", "dtype", "model"),
        "program": program_of(args),
        **({} if args.last is None else {"scope": last(args.last)}),
        **({"store": True, **naming_options(args, args.name)} if args.name is not None else {}),
        "layers": layers_of(args),
    }
    texts = args.prompts or texts_of(args)
    sites = args.site or ["resid_post"]
    if args.detach and args.out is not None:
        raise ValueError("--out has the rows, which --detach does not wait for: store them with --name")
    result = job_outcome(args, Client.read_activations, requests.read_activations, texts, sites, **options)
    if result is None:
        return 0
    if args.out is not None:
        write_rows(args.out, result)
    if args.json:
        print_json(result.to_dict() if args.out is None else {**result.to_dict(), "rows": []})
        return 0
    _show(result)
    if args.out is not None:
        note(f"written to {args.out}")
    if result.artifact is not None:
        note_stored(result.artifact)
    return 0


def _show(result: ReadActivations) -> None:
    if result.rows:
        shown = [(rows.site, rows.layer, len(rows), rows.values.shape[1]) for rows in result.rows]
        table(("site", "layer", "rows", "width"), shown)
    if result.moments:
        table(("site", "layer", "tokens"), [(each.site, each.layer, each.tokens) for each in result.moments])
    if result.means:
        rows = [(each.site, each.layer, each.label, each.tokens) for each in result.means]
        table(("site", "layer", "label", "tokens"), rows)
    note(f"{result.texts:,} texts, {result.tokens:,} tokens, {result.n_rows:,} rows")


def write_rows(path: Path, result: ReadActivations) -> None:
    """Writes rows as the artifact `activations` has them, but for labels. Raises ValueError for no rows."""
    if not result.rows:
        raise ValueError("--out: there are no rows; moments and means are printed with --json")
    first = result.rows[0]
    parts = {name: _int64(first, field) for name, field in _INDICES.items()}
    header = {name: ("I64", [len(first)], len(data)) for name, data in parts.items()}
    for rows in result.rows:
        name = f"{rows.site}.{rows.layer}"
        parts[name] = rows.values.data
        header[name] = (_STORED_TYPES[rows.values.dtype], list(rows.values.shape), len(rows.values.data))
    entries, offset = {}, 0
    for name, (dtype, shape, size) in header.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(parts.values())


def _int64(rows: ActivationRows, field: str) -> bytes:
    return b"".join(number.to_bytes(8, "little", signed=True) for number in getattr(rows, field))
