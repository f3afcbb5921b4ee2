"""Turns the messages of confidence into what is asked, and reports into messages. Refusals name fields."""

from collections.abc import Sequence

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import distinct, finite
from patchclamp_server.interventions.resolver import check_indices
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.confidence import EVEN, Confidence, ConfidenceReport, Option
from patchclamp_server.text.prompt import PromptEncoder

MAX_OPTIONS = 64


def decode_confidence(
    proto: pb.Confidence, model: ModelInfo, prompts: PromptEncoder, prompt: Sequence[int], field: str = "confidence"
) -> Confidence:
    """Returns what is asked of an answer to `prompt`. Raises InvalidArgument."""
    given = distinct(proto.layers, f"{field}.layers")
    check_indices(given, model.n_layers, f"{field}.layers", "layer")
    last = model.n_layers - 1
    if not last or given == (last,):
        message = f"expected a layer before the last, {last}: confidence is how far they agree with it"
        raise InvalidArgument(f"{field}.layers", message)
    options = _options(proto, prompts, prompt, field)
    listed = given or tuple(range(model.n_layers))
    thresholds = _thresholds(proto, len(listed), field)
    if not options:
        return Confidence(tuple(sorted(listed)), model.n_layers)
    ordered = sorted(zip(listed, thresholds, strict=True))
    return Confidence(
        tuple(layer for layer, _ in ordered), model.n_layers, options, tuple(threshold for _, threshold in ordered)
    )


def _options(proto: pb.Confidence, prompts: PromptEncoder, prompt: Sequence[int], field: str) -> tuple[Option, ...]:
    n = len(proto.options)
    if n == 1 or n > MAX_OPTIONS:
        raise InvalidArgument(f"{field}.options", f"expected none, or from 2 to {MAX_OPTIONS}, got {n}")
    first: dict[int, int] = {}
    for i, text in enumerate(proto.options):
        path = f"{field}.options[{i}]"
        ids = prompts.encode_continuation(text, path, prompt) if text else ()
        if not ids:
            raise InvalidArgument(path, "expected a text that has a token")
        if ids[0] in first:
            message = f"starts with the same token as option {first[ids[0]]}, {prompts.piece(ids[0])!r}"
            raise InvalidArgument(path, message)
        first[ids[0]] = i
    return tuple(Option(text, token) for text, token in zip(proto.options, first, strict=True))


def _thresholds(proto: pb.Confidence, n_layers: int, field: str) -> tuple[float, ...]:
    n = len(proto.thresholds)
    if n and len(proto.options) != 2:
        message = f"expected none: they divide two options, and there are {len(proto.options)}"
        raise InvalidArgument(f"{field}.thresholds", message)
    if n not in (0, n_layers):
        raise InvalidArgument(f"{field}.thresholds", f"expected one for each of the {n_layers} layers, got {n}")
    given = (finite(value, f"{field}.thresholds[{i}]", low=0.0, high=1.0) for i, value in enumerate(proto.thresholds))
    return tuple(given) or (EVEN,) * n_layers


def encode_confidence(report: ConfidenceReport) -> pb.ConfidenceReport:
    return pb.ConfidenceReport(
        consistency=report.consistency,
        layers=report.layers,
        layer_agreement=report.layer_agreement,
        layer_probability=report.layer_probability,
        options=[
            pb.OptionConfidence(option=own.option, token=own.token, probability=own.probability)
            for own in report.options
        ],
        tokens=report.tokens,
    )
