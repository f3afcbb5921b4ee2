"""patchclamp jobs list | status | follow | cancel"""

import argparse
import math
from collections.abc import Callable
from typing import Any

from patchclamp.cli import concept_circuit, extract, subspace
from patchclamp.cli.activations import patch
from patchclamp.cli.features import search
from patchclamp.cli.heads import ablate, circuit, detect, score
from patchclamp.cli.neurons import census, decode, describe, evaluate, find, localize, match
from patchclamp.cli.neurons.shown import add_picture_argument
from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.sparsity import calibrate
from patchclamp.cli.terminal import job_result, note, print_json, table
from patchclamp.cli.watch import reference
from patchclamp.results import (
    Artifact,
    CalibratedProfile,
    Circuit,
    DecodedNeuron,
    ExtractionResult,
    FoundConceptCircuit,
    FoundFeatures,
    FoundNeurons,
    FoundSubspace,
    HeadEditEffect,
    Job,
    JobResult,
    LocalizedNeurons,
    MatchedNeurons,
    NeuronCensus,
    NeuronDescription,
    NeuronEditEffect,
    PatchGrid,
    RetrievalHeads,
    ScoredHeads,
)

_REPORTS: dict[type, Callable[[argparse.Namespace, Any], None]] = {
    Artifact: reference.show,
    CalibratedProfile: calibrate.show,
    Circuit: circuit.show,
    DecodedNeuron: decode.show,
    ExtractionResult: extract.show,
    FoundFeatures: search.show,
    FoundConceptCircuit: concept_circuit.show,
    FoundNeurons: find.show,
    FoundSubspace: subspace.show,
    HeadEditEffect: ablate.show,
    LocalizedNeurons: localize.show,
    MatchedNeurons: match.show,
    NeuronCensus: census.show,
    NeuronDescription: describe.show,
    NeuronEditEffect: evaluate.show,
    PatchGrid: patch.show,
    RetrievalHeads: detect.show,
    ScoredHeads: score.show,
}
_DRAWN = (
    Circuit,
    FoundConceptCircuit,
    FoundNeurons,
    LocalizedNeurons,
    NeuronCensus,
    NeuronEditEffect,
    PatchGrid,
    RetrievalHeads,
    ScoredHeads,
)
# What the command line of a job said and its result does not.
_UNTOLD = argparse.Namespace(
    controls=None,
    grid=None,
    layers=(),
    method="score",
    mode="edited",
    name=None,
    neurons="",
    other="the other",
    vector=None,
    words=(),
)


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
    add_picture_argument(follow, "the picture that the command of the job would draw")

    cancel = actions.add_parser("cancel", parents=[connection_options()], help="end a job that runs")
    cancel.set_defaults(run=run_cancel)

    for action in (status, follow, cancel):
        action.add_argument("id", help="as --detach and `jobs list` print it")


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
    if args.json:
        print_json(result)
    else:
        report(args, result)
    return 0


def report(args: argparse.Namespace, result: JobResult) -> None:
    """Prints what the command of the job would, and draws its picture. Of a command that needs more than the result to
    tell what it found, prints JSON."""
    kind = type(result[0]) if isinstance(result, tuple) and result else type(result)
    show = _REPORTS.get(kind)
    if show is None:
        print_json(result)
        return
    if args.picture is not None and kind not in _DRAWN:
        raise ValueError("--picture: there is none of what this job found")
    show(argparse.Namespace(**{**vars(_UNTOLD), **vars(args), "heatmap": args.picture}), result)


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
