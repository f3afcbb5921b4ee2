"""patchclamp watch create"""

import argparse

from google.protobuf import json_format

from patchclamp.cli.files import parsed_file
from patchclamp.cli.naming import add_naming_arguments, naming_options, note_moved
from patchclamp.cli.options import add_model_argument, connect, connection_options
from patchclamp.cli.parser import count
from patchclamp.cli.terminal import note, print_json
from patchclamp.cli.watch.item_spec import ITEM_OPTIONS
from patchclamp.v1 import monitoring_pb2 as pb


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser("create", parents=[connection_options()], help="store what is to be watched")
    parser.add_argument("name", help="tag to store the watch under")
    group = parser.add_argument_group(
        "items",
        "each may be given several times; an item fires above its threshold: a number, or a percentile of its own "
        "values such as p99, which is the default (features: 0)",
    )
    for option, read, metavar, text in ITEM_OPTIONS:
        group.add_argument(option, type=read, action="append", dest="items", default=[], metavar=metavar, help=text)
    group.add_argument("--top", type=count, default=0, metavar="K", help="of every head set, the K best")
    group.add_argument("--include-sink", action="store_true", help="heads: the first token of a text counts too")
    group.add_argument(
        "--items",
        type=items_file,
        action="extend",
        metavar="FILE",
        help='{"items": [...]} in protobuf JSON: WatchItem messages, SAE features by their rows too',
    )
    add_naming_arguments(parser)
    add_model_argument(parser)
    parser.set_defaults(run=run)


def items_file(path: str) -> list[pb.WatchItem]:
    """Reads the items of a CreateWatchRequest in protobuf JSON."""
    return parsed_file(path, _items)


def _items(text: str) -> list[pb.WatchItem]:
    try:
        return list(json_format.Parse(text, pb.CreateWatchRequest()).items)
    except json_format.ParseError as error:
        raise ValueError(error) from None


def run(args: argparse.Namespace) -> int:
    if not args.items:
        raise ValueError(f"nothing to watch: give {', '.join(option for option, *_ in ITEM_OPTIONS)} or --items")
    head_sets = [item.heads.heads for item in args.items if item.heads.heads.head_set]
    if args.top and not head_sets:
        raise ValueError("--top keeps the best heads of a head set, and none is watched")
    for selection in head_sets:
        selection.top_k = args.top or selection.top_k
    for item in args.items:
        if args.include_sink and item.HasField("heads"):
            item.heads.include_sink = True
    with connect(args) as client:
        watch = client.create_watch(args.items, model=args.model, **naming_options(args, args.name))
    if args.json:
        print_json(watch)
        return 0
    for item in watch.items:
        print(item)
    note_moved(watch.artifact)
    note(f"{len(watch.items)} items stored as {args.name} = {watch.artifact.id}")
    return 0
