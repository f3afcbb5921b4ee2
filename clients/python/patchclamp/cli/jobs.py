"""patchclamp jobs list | status | follow | cancel, and --detach of the commands that begin them"""

import argparse
import math
from collections.abc import Callable
from typing import Any

from patchclamp.cli.naming import note_moved
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import job_result, note, print_json, table
from patchclamp.collectors import ResultT
from patchclamp.requests import JobRequest
from patchclamp.results import (
    Artifact,
    FoundNeurons,
    Job,
    JobResult,
    LocalizedNeurons,
    MatchedNeurons,
    NeuronCensus,
)
from patchclamp.streams import Stream

# Options that say how the result is shown.
_OF_THE_RESULT = ("heatmap", "grid", "picture")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("jobs", help="long calls that go on without their terminal: see --detach of a command")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    listing = actions.add_parser("list", parents=[connection_options()], help="jobs of this caller, the newest first")
    listing.set_defaults(run=run_list)

    status = actions.add_parser("status", parents=[connection_options()], help="what is known of a job")
    status.set_defaults(run=run_status)

    follow = actions.add_parser(
        "follow",
        parents=[connection_options(timeout=math.inf)],
        help="progress of a job until its end, and what it found; Ctrl-C ends only the following",
    )
    follow.set_defaults(run=run_follow)

    cancel = actions.add_parser("cancel", parents=[connection_options()], help="end a job that runs")
    cancel.set_defaults(run=run_cancel)

    for action in (status, follow, cancel):
        action.add_argument("id", help="as --detach and `jobs list` print it")


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


def run_list(args: argparse.Namespace) -> int:
    with connect(args) as client:
        jobs = client.jobs()
    if args.json:
        print_json(jobs)
    else:
        rows = [(job.id, job.method, _state(job), _progress(job), job.created[:19]) for job in jobs]
        table(("id", "method", "state", "progress", "created"), rows)
    return 0


def run_status(args: argparse.Namespace) -> int:
    with connect(args) as client:
        job = client.job(args.id)
    return _show(args, job)


def run_cancel(args: argparse.Namespace) -> int:
    with connect(args) as client:
        job = client.cancel_job(args.id)
    return _show(args, job)


def run_follow(args: argparse.Namespace) -> int:
    try:
        with connect(args) as client, client.follow_job(args.id, timeout=args.timeout) as stream:
            result = job_result(stream, quiet=args.json)
    except KeyboardInterrupt:
        note(f"{args.id} goes on; `patchclamp jobs cancel {args.id}` ends it")
        raise
    artifacts = _stored(result)
    if args.json or not artifacts:
        print_json(result)
        return 0
    for artifact in artifacts:
        # Several are told apart by their names.
        print(artifact.id, *(artifact.tags if len(artifacts) > 1 else ()))
        note_moved(artifact)
    return 0


def _stored(result: JobResult) -> list[Artifact]:
    """Returns what a job has stored, if its method stores anything."""
    match result:
        case Artifact():
            return [result]
        case FoundNeurons(found=found):
            sets = [found]
        case LocalizedNeurons():
            sets = [each.stored for each in result.sets]
        case NeuronCensus():
            sets = [each.stored for each in result.classes]
        case MatchedNeurons(ported=ported):
            sets = [ported]
        case _:
            artifact = getattr(result, "artifact", None)
            return [] if artifact is None else [artifact]
    # A set of no neuron is not stored.
    return [each.artifact for each in sets if each.artifact.id]


def _show(args: argparse.Namespace, job: Job) -> int:
    if args.json:
        print_json(job)
        return 0
    print(f"{job.id}  {job.method}")
    print(f"  state     {_state(job)}")
    print(f"  progress  {_progress(job)}")
    print(f"  created   {job.created}")
    if job.ended:
        print(f"  ended     {job.ended}")
    if job.error:
        print(f"  error     {job.error}")
    return 0


def _state(job: Job) -> str:
    return f"{job.state} ({job.error_code})" if job.error_code else job.state


def _progress(job: Job) -> str:
    return f"{job.stage} {job.done}/{job.total}" if job.stage else "-"
