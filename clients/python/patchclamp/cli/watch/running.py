"""patchclamp watch list, patchclamp watch stop"""

import argparse

from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.results import RunningWatch


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    listing = actions.add_parser("list", parents=[connection_options()], help="watches that run, and on which servers")
    listing.set_defaults(run=run_list)
    stop = actions.add_parser(
        "stop", parents=[connection_options()], help="end a watch on all servers of its store; its series vanish"
    )
    stop.add_argument("name")
    stop.set_defaults(run=run_stop)


def run_list(args: argparse.Namespace) -> int:
    with connect(args) as client:
        running = client.list_watches()
    if args.json:
        print_json(running)
        return 0
    rows = [
        (
            watch.name,
            len(watch.items),
            watch.tokens,
            ",".join(watch.phases),
            f"{watch.sampling_rate:g}",
            watch.reference[:19] or "none",
            watch.watch[:19],
            _where(watch),
        )
        for watch in running.watches
    ]
    table(("watch", "items", "tokens", "phases", "sampled", "reference", "artifact", "runs on"), rows)
    for watch in running.watches:
        for each in watch.replicas:
            if each.reason:
                note(f"{watch.name} does not run on {each.replica}: {each.reason}")
    items = sum(len(watch.items) for watch in running.watches)
    note(f"{len(rows)} of {running.max_watches} watches, {items} of {running.max_items} items")
    return 0


def _where(watch: RunningWatch) -> str:
    if watch.configured:
        return "this server (--watch)"
    running = sum(each.state == "running" for each in watch.replicas)
    return f"{running} of {len(watch.replicas)} servers"


def run_stop(args: argparse.Namespace) -> int:
    with connect(args) as client:
        watch = client.stop_watch(args.name)
    if args.json:
        print_json(watch)
    else:
        note(f"{watch.name} saw {watch.tokens} tokens")
    return 0
