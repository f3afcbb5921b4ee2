"""Long calls of a command: with progress to their end, or begun as a job that goes on by itself (--detach)."""

import argparse
from collections.abc import Callable
from typing import Any

from patchclamp.cli.options import connect
from patchclamp.cli.terminal import job_result, print_json
from patchclamp.collectors import ResultT
from patchclamp.requests import JobRequest
from patchclamp.streams import Stream

# Options that say how the result is shown.
_OF_THE_RESULT = ("heatmap", "grid", "picture")


def job_outcome(
    args: argparse.Namespace,
    call: Callable[..., Stream[Any, Any, ResultT]],
    build: Callable[..., JobRequest],
    *arguments: Any,
    **options: Any,
) -> ResultT | None:
    """Returns the result of a job, with its progress on the way; with --detach it only begins, and there is None.

    call, build: the method of Client and the builder of patchclamp.requests, which take the same arguments.
    """
    if args.detach:
        _detach(args, build(*arguments, **options))
        return None
    with connect(args) as client, call(client, *arguments, timeout=args.timeout, **options) as stream:
        return job_result(stream, quiet=args.json)


def add_detach_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detach",
        action="store_true",
        help="begin, print the id of the job, and end: `patchclamp jobs` knows the rest",
    )


def _detach(args: argparse.Namespace, request: JobRequest) -> None:
    """Begins a job, and prints its id. ValueError for an option that says how the result is shown."""
    for option in _OF_THE_RESULT:
        if getattr(args, option, None) is not None:
            raise ValueError(f"--{option} shows the result, which --detach does not wait for")
    with connect(args) as client:
        job = client.start_job(request)
    if args.json:
        print_json(job)
    else:
        print(job.id)
