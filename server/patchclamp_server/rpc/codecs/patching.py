"""Messages of PatchActivations ↔ analysis/patching."""

from collections.abc import Sequence

from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import generation_pb2
from patchclamp_server.analysis.patching.grid import Column, Direction, Metric, Pair, Patching
from patchclamp_server.analysis.patching.job import CellEffect, Patched
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, distinct_names, known, required
from patchclamp_server.interventions.program import PositionRange
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.common import decode_layers
from patchclamp_server.rpc.codecs.program import SITE_NUMBERS, decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_PAIRS, MAX_CELLS, MAX_RUNS = 1000, 65_536, 1_000_000
# This bounds the activations of one run that are held: every site, layer and token of the grid.
MAX_ACTIVATION_BYTES = 2 << 30
DEFAULT_SITES = (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT)
DIRECTIONS: dict[int, Direction] = {pb.PatchDirection.Value(f"PATCH_DIRECTION_{each.name}"): each for each in Direction}
METRICS: dict[int, Metric] = {pb.PatchMetric.Value(f"PATCH_METRIC_{each.name}"): each for each in Metric}


def decode_patching(proto: pb.PatchActivationsRequest, prompts: PromptEncoder, info: ModelInfo) -> Patching:
    """Returns a checked job. It tokenises: call it in a thread."""
    direction = known(proto.direction or 1, DIRECTIONS, "direction", pb.PatchDirection.keys()[1:])
    metric = known(proto.metric or 1, METRICS, "metric", pb.PatchMetric.keys()[1:])
    sites = _sites(proto, info)
    layers = decode_layers(proto.layers, info)
    window = count(proto.layer_window or 1, "layer_window", low=1, high=info.n_layers)
    if not 1 <= len(proto.pairs) <= MAX_PAIRS:
        raise InvalidArgument("pairs", f"expected 1 to {MAX_PAIRS}, got {len(proto.pairs)}")
    pairs = tuple(_pair(pair, metric, prompts, info, f"pairs[{i}]") for i, pair in enumerate(proto.pairs))
    _check_activations(pairs, sites, info)
    columns = _columns(proto.positions, pairs)
    job = Patching(pairs, sites, layers, columns, direction, metric, window, proto.by_head, proto.seed)
    _check_size(job, info)
    return job


def encode_patching(event: Progress | CellEffect | Patched) -> pb.PatchActivationsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.PatchActivationsResponse)
    if isinstance(event, CellEffect):
        cell = pb.PatchCell(
            site=SITE_NUMBERS[event.cell.site],
            layer=event.cell.layer,
            positions=event.cell.column,
            head=event.cell.head,
            metric=event.metric,
            effect=event.effect,
            low=event.low,
            high=event.high,
        )
        return pb.PatchActivationsResponse(cell=cell)
    job = event.job
    result = pb.PatchResult(
        source_metric=event.source_metric,
        unpatched_metric=event.unpatched_metric,
        sites=[SITE_NUMBERS[site] for site in job.sites],
        layers=job.layers,
        positions=[column.name for column in job.columns],
        requests=event.requests,
        warnings=event.warnings,
    )
    return pb.PatchActivationsResponse(result=result)


def _sites(proto: pb.PatchActivationsRequest, info: ModelInfo) -> tuple[Site, ...]:
    sites = tuple(decode_site(number, f"sites[{i}]") for i, number in enumerate(distinct(proto.sites, "sites")))
    for i, site in enumerate(sites):
        if site not in info.sites:
            has = ", ".join(each.value for each in info.sites)
            raise InvalidArgument(f"sites[{i}]", f"{info.architecture} has no site {site.value}; it has {has}")
    if proto.by_head and Site.ATTN_Z not in sites:
        raise InvalidArgument("by_head", "heads are patched at attn_z, which is not among the sites")
    return sites or DEFAULT_SITES


def _pair(proto: pb.PatchPair, metric: Metric, prompts: PromptEncoder, info: ModelInfo, field: str) -> Pair:
    clean, corrupt = (_prompt(proto, name, prompts, field) for name in ("clean", "corrupt"))
    if clean == corrupt:
        raise InvalidArgument(f"{field}.corrupt", "is the clean prompt; expected another one")
    answer: tuple[int, ...] = ()
    other: tuple[int, ...] = ()
    if metric is not Metric.DIVERGENCE:
        answer = _answer(proto.answer, prompts, f"{field}.answer", clean)
    if metric is Metric.LOG_PROBABILITY_DIFFERENCE:
        other = _answer(proto.other_answer, prompts, f"{field}.other_answer", corrupt)
        if answer == other:
            raise InvalidArgument(f"{field}.other_answer", "is the answer; expected another one")
    longest = max(len(clean), len(corrupt)) + max(len(answer), len(other), 1)
    if longest > info.context_length:
        message = f"has {longest} tokens with an answer, more than the context length {info.context_length}"
        raise InvalidArgument(field, message)
    return Pair(clean, corrupt, answer, other)


def _prompt(proto: pb.PatchPair, name: str, prompts: PromptEncoder, field: str) -> tuple[int, ...]:
    required(proto, name, field)
    prompt: generation_pb2.Prompt = getattr(proto, name)
    return decode_prompt(prompt, prompts, f"{field}.{name}").ids


def _answer(text: str, prompts: PromptEncoder, field: str, after: tuple[int, ...]) -> tuple[int, ...]:
    ids = prompts.encode_continuation(text, field, after)
    if not ids:
        raise InvalidArgument(field, "is empty; the metric needs at least one token of it")
    return ids


def _check_activations(pairs: Sequence[Pair], sites: Sequence[Site], info: ModelInfo) -> None:
    of_token = 4 * info.n_layers * sum(info.sites[site] for site in sites)
    for i, pair in enumerate(pairs):
        for name, tokens in (("clean", pair.clean), ("corrupt", pair.corrupt)):
            if len(tokens) * of_token > MAX_ACTIVATION_BYTES:
                most = MAX_ACTIVATION_BYTES // of_token
                message = f"has {len(tokens)} tokens; activations of {most} are held at {len(sites)} site(s)"
                raise InvalidArgument(f"pairs[{i}].{name}", message)


def _columns(protos: Sequence[pb.PatchPositions], pairs: Sequence[Pair]) -> tuple[Column, ...]:
    if not protos:
        shortest = min(min(len(pair.clean), len(pair.corrupt)) for pair in pairs)
        return tuple(Column(str(p), PositionRange(p, p + 1)) for p in range(-shortest, 0))
    columns = []
    distinct_names((proto.name for proto in protos), "positions")
    for i, proto in enumerate(protos):
        if not proto.name:
            raise InvalidArgument(f"positions[{i}].name", "expected a name that is not empty")
        required(proto, "positions", f"positions[{i}]")
        end = proto.positions.end if proto.positions.HasField("end") else None
        columns.append(Column(proto.name, PositionRange(proto.positions.start, end)))
        _check_column(columns[-1], pairs, f"positions[{i}].positions")
    return tuple(columns)


def _check_column(column: Column, pairs: Sequence[Pair], field: str) -> None:
    """A column has as many tokens in either prompt of a pair, at least one, all of which are there."""
    for i, pair in enumerate(pairs):
        found = {}
        for name, tokens in (("clean", pair.clean), ("corrupt", pair.corrupt)):
            own = found[name] = column.of(len(tokens))
            if not own or own.start < 0 or own.stop > len(tokens):
                message = f"selects [{own.start}, {own.stop}) of the {len(tokens)} tokens of pairs[{i}].{name}"
                raise InvalidArgument(field, f"{message}; expected tokens that are there, at least one")
        clean, corrupt = len(found["clean"]), len(found["corrupt"])
        if clean != corrupt:
            message = f"selects {clean} tokens of pairs[{i}].clean and {corrupt} of its corrupt prompt"
            raise InvalidArgument(field, f"{message}; expected equally many: count both ends from the same side")


def _check_size(job: Patching, info: ModelInfo) -> None:
    n = sum(1 for _ in job.cells(info.n_heads))
    if n > MAX_CELLS:
        raise InvalidArgument("positions", f"{n} cells; expected at most {MAX_CELLS}: fewer positions, layers or sites")
    runs = n * len(job.pairs)
    if runs > MAX_RUNS:
        message = f"{runs} runs, {n} cells for each of {len(job.pairs)} pairs; expected at most {MAX_RUNS}"
        raise InvalidArgument("pairs", message)
