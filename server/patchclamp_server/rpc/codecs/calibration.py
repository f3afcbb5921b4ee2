"""Messages of CalibrateVector ↔ analysis/steering/calibration. Refusals name fields."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, TypeAlias

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.neurons.intervals import Interval
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.calibration.effects import (
    ClassifierEffect,
    Effect,
    ProbeEffect,
    ProjectionEffect,
    TargetsEffect,
    WordsEffect,
)
from patchclamp_server.analysis.steering.calibration.job import Calibrated, Calibration
from patchclamp_server.analysis.steering.calibration.points import Arm, CalibrationPrompt, DosePoint
from patchclamp_server.analysis.steering.calibration.word_classifier import WordClassifier
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.field_checks import count, distinct, finite
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.interventions.safe_strengths import Application
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_tags, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.program import decode_scope
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

Ids: TypeAlias = tuple[int, ...]
DEFAULT_LAYERS, MAX_STRENGTHS = 8, 64
# Layers times strengths: what the evidence card has room for.
MAX_CELLS = 256
MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS, MAX_MAX_TOKENS = 32, 512
DEFAULT_RANDOM_VECTORS, MAX_RANDOM_VECTORS = 3, 32
DEFAULT_PERPLEXITY_RATIO, DEFAULT_REPETITION = 2.0, 0.3
MAX_STRENGTH = 1e6
MAX_WORDS, MAX_TARGET_TEXTS, MAX_CLASSIFIER_TEXTS = 64, 64, 20_000
# Between an instruction and the text or system message that it is put before.
AFTER_INSTRUCTION = "\n\n"

ARMS: dict[Arm, "pb.CalibrationArm.ValueType"] = {
    arm: pb.CalibrationArm.Value(f"CALIBRATION_ARM_{arm.name}") for arm in Arm
}


def decode_calibration(
    request: pb.CalibrateVectorRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Calibration:
    """Returns a checked job. It tokenises all prompts and may train a classifier: call it in a thread.

    Raises InvalidArgument, and NotFound or FailedPrecondition for the vector and for a chat without a template.
    """
    if not request.vector:
        raise InvalidArgument("vector", "expected the id or tag of a vector artifact")
    vector = Resolver(info, store).artifact(request.vector, ArtifactKind.VECTOR, "vector")
    application = _application(request)
    layers = _layers(request.layers, vector)
    for layer in layers:
        if not float(vector.direction(layer).float().norm()) > 0.0:
            raise InvalidArgument("vector", f"is zero at layer {layer}, and does nothing there at any strength")
    strengths = _strengths(request.strengths, application)
    if len(layers) * len(strengths) > MAX_CELLS:
        message = f"{len(strengths)} strengths at {len(layers)} layers; at most {MAX_CELLS} in all are calibrated"
        raise InvalidArgument("strengths", message)
    scope = decode_scope(request.scope, "scope")
    check_scope(scope, "scope", vocab_size=info.vocab_size, has_roles=False)
    most = min(MAX_MAX_TOKENS, info.context_length - 1)
    max_tokens = count(request.max_tokens or min(DEFAULT_MAX_TOKENS, most), "max_tokens", low=1, high=most)
    decoded = _prompts(request, max_tokens, prompts, info)
    return Calibration(
        vector,
        application,
        layers,
        strengths,
        decoded,
        _effect(request, vector, decoded, prompts, store, info),
        max_tokens=max_tokens,
        scope=scope,
        random_vectors=count(
            request.random_vectors or DEFAULT_RANDOM_VECTORS, "random_vectors", low=1, high=MAX_RANDOM_VECTORS
        ),
        max_perplexity_ratio=_bound(request, "max_perplexity_ratio", DEFAULT_PERPLEXITY_RATIO, math.inf),
        max_repetition=_bound(request, "max_repetition", DEFAULT_REPETITION, 1.0),
        seed=request.seed,
        tags=decode_tags(request.tags, request.replace_tags),
    )


def encode_calibration(event: Progress | DosePoint | Calibrated) -> pb.CalibrateVectorResponse:
    match event:
        case Progress():
            return encode_progress(event, pb.CalibrateVectorResponse)
        case DosePoint():
            return pb.CalibrateVectorResponse(point=_point(event))
        case Calibrated():
            result = pb.CalibrationResult(
                artifact=encode_artifact(event.artifact),
                points=map(_point, event.points),
                safe=[pb.SafeRange(layer=at, low=safe.low, high=safe.high) for at, safe in event.safe.items()],
                layer=event.layer,
                strength=event.strength,
                prompt_wins=event.prompt_wins,
                warnings=event.warnings,
            )
            return pb.CalibrateVectorResponse(result=result)


def _point(point: DosePoint) -> pb.DosePoint:
    return pb.DosePoint(
        arm=ARMS[point.arm],
        layer=point.layer,
        strength=point.strength,
        effect=encode_interval(point.effect),
        perplexity=encode_interval(point.perplexity),
        repetition=encode_interval(point.repetition),
        distinct=encode_interval(point.distinct),
        divergence=encode_interval(point.divergence),
        example=point.example,
    )


def encode_interval(interval: Interval) -> pb.Interval:
    return pb.Interval(**asdict(interval))


def _application(request: pb.CalibrateVectorRequest) -> Application:
    name = request.WhichOneof("application")
    if name is None:
        return Application.ADD
    if not getattr(request, name):
        raise InvalidArgument(name, "expected true, or another way to apply the vector")
    return Application(name)


def _layers(asked: Sequence[int], vector: Artifact) -> tuple[int, ...]:
    has = vector.info.layers
    for i, layer in enumerate(asked):
        if layer not in has:
            raise InvalidArgument(f"layers[{i}]", f"the vector has no layer {layer}; it has {list(has)}")
    if asked:
        return tuple(sorted(distinct(asked, "layers")))
    n = min(len(has), DEFAULT_LAYERS)
    return tuple(has[round(i * (len(has) - 1) / max(1, n - 1))] for i in range(n))


def _strengths(asked: Sequence[float], application: Application) -> tuple[float, ...]:
    if len(asked) > MAX_STRENGTHS:
        raise InvalidArgument("strengths", f"expected at most {MAX_STRENGTHS}, got {len(asked)}")
    low, high = (0.0, math.pi) if application is Application.ROTATE_TOWARDS else (-MAX_STRENGTH, MAX_STRENGTH)
    for i, strength in enumerate(asked):
        finite(strength, f"strengths[{i}]", low=low, high=high)
        if i and strength <= asked[i - 1]:
            raise InvalidArgument(f"strengths[{i}]", f"expected ascending numbers, got {strength:g} after more")
    if asked and not any(asked):
        raise InvalidArgument("strengths", "expected one that is not 0")
    return tuple(asked)


def _bound(
    request: pb.CalibrateVectorRequest,
    name: Literal["max_perplexity_ratio", "max_repetition"],
    default: float,
    high: float,
) -> float:
    return finite(getattr(request, name), name, low=0.0, high=high) if request.HasField(name) else default


def _prompts(
    request: pb.CalibrateVectorRequest, max_tokens: int, encoder: PromptEncoder, info: ModelInfo
) -> tuple[CalibrationPrompt, ...]:
    if not 1 <= len(request.prompts) <= MAX_PROMPTS:
        raise InvalidArgument("prompts", f"expected 1 to {MAX_PROMPTS} prompts, got {len(request.prompts)}")
    room = info.context_length - max_tokens
    decoded = []
    for i, proto in enumerate(request.prompts):
        plain = decode_prompt(proto, encoder, f"prompts[{i}]").ids
        instructed = None
        if request.instruction:
            told = _instructed(proto, request.instruction, f"prompts[{i}]")
            with about("instruction"):
                instructed = decode_prompt(told, encoder).ids
        for ids, field in ((plain, f"prompts[{i}]"), (instructed or (), "instruction")):
            if len(ids) > room:
                raise InvalidArgument(field, f"has {len(ids)} tokens; expected at most {room}, and {max_tokens} after")
        decoded.append(CalibrationPrompt(plain, instructed))
    return tuple(decoded)


def _instructed(proto: generation_pb2.Prompt, instruction: str, field: str) -> generation_pb2.Prompt:
    """Returns the prompt with the instruction before it, in a chat as its system message or the beginning of it."""
    told = generation_pb2.Prompt()
    told.CopyFrom(proto)
    match proto.WhichOneof("form"):
        case "text":
            told.text = instruction + AFTER_INSTRUCTION + proto.text
        case "chat":
            messages = list(proto.chat.messages)
            system = messages.pop(0).content if messages[0].role == "system" else ""
            content = instruction + AFTER_INSTRUCTION + system if system else instruction
            told.chat.ClearField("messages")
            told.chat.messages.add(role="system", content=content)
            told.chat.messages.extend(messages)
        case _:
            message = "an instruction is put before texts and chats; tokens are no place for it"
            raise InvalidArgument(f"{field}.tokens", message)
    return told


def _effect(
    request: pb.CalibrateVectorRequest,
    vector: Artifact,
    decoded: Sequence[CalibrationPrompt],
    prompts: PromptEncoder,
    store: ArtifactStore,
    info: ModelInfo,
) -> Effect:
    effect = request.effect
    match effect.WhichOneof("measure"):
        case "probe":
            if not effect.probe:
                raise InvalidArgument("effect.probe", "expected the id or tag of a probe")
            # By its id, since a tag may move meanwhile.
            probe = Resolver(info, store).artifact(effect.probe, ArtifactKind.PROBE, "effect.probe").info.id
            with about("effect.probe"):
                return ProbeEffect.of_probe(probe, info, store)
        case "classifier":
            return _classifier(effect.classifier, "effect.classifier", request.seed, prompts, store, info)
        case "target_texts":
            return _targets(effect.target_texts.texts, "effect.target_texts.texts", decoded, prompts, info)
        case "words":
            words = tuple(effect.words.words)
            if not 1 <= len(words) <= MAX_WORDS or not all(words):
                message = f"expected 1 to {MAX_WORDS} words, none of them empty"
                raise InvalidArgument("effect.words.words", message)
            return WordsEffect(words)
        case "projection" if not effect.projection:
            raise InvalidArgument("effect.projection", "expected true, or another measure")
        case _:
            return ProjectionEffect.on(vector, info)


def _classifier(
    proto: pb.EffectClassifier, field: str, seed: int, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> ClassifierEffect:
    source = decode_texts(proto.texts, f"{field}.texts", prompts, store, info)
    corpus, target = source.corpus, source.label(proto.target, f"{field}.target")
    labelled = [i for i in range(len(corpus)) if corpus.document_labels[i] != UNLABELLED]
    if len(labelled) > MAX_CLASSIFIER_TEXTS:
        message = f"expected at most {MAX_CLASSIFIER_TEXTS} labelled texts, got {len(labelled)}"
        raise InvalidArgument(f"{field}.texts", message)
    texts = []
    for i in labelled:
        text = corpus.document(i).text
        texts.append(text if isinstance(text, str) else prompts.decode(text, skip_special_tokens=True))
    try:
        classifier = WordClassifier(texts, [int(corpus.document_labels[i]) == target for i in labelled], seed)
    except ValueError as error:
        raise InvalidArgument(f"{field}.texts", str(error)) from error
    return ClassifierEffect(classifier, proto.target)


def _targets(
    texts: Sequence[str], field: str, decoded: Sequence[CalibrationPrompt], prompts: PromptEncoder, info: ModelInfo
) -> TargetsEffect:
    if not 1 <= len(texts) <= MAX_TARGET_TEXTS:
        raise InvalidArgument(field, f"expected 1 to {MAX_TARGET_TEXTS} texts, got {len(texts)}")
    continuations: dict[Ids, tuple[Ids, ...]] = {}
    for prompt in {ids for each in decoded for ids in (each.plain, each.instructed) if ids is not None}:
        found = []
        for i, text in enumerate(texts):
            ids = prompts.encode_continuation(text, f"{field}[{i}]", prompt)
            if not ids:
                raise InvalidArgument(f"{field}[{i}]", "is empty; at least one token is scored")
            if len(prompt) + len(ids) > info.context_length:
                message = f"does not fit into the context of {info.context_length} tokens after a prompt"
                raise InvalidArgument(f"{field}[{i}]", message)
            found.append(ids)
        continuations[prompt] = tuple(found)
    return TargetsEffect(continuations)
