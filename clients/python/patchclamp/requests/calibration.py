"""Requests that choose the strength of a vector, and that tell what vectors detect."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from patchclamp.effects import EffectLike
from patchclamp.fields import build, build_as, instance, one_or_several, one_text_or_several, several, shown
from patchclamp.names import (
    CALIBRATION_APPLICATIONS,
    DETECTION_POOLINGS,
    CalibrationApplicationName,
    DetectionPoolingName,
    value_of,
)
from patchclamp.neurons.texts import TextsLike, texts_message
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import program_pb2
from patchclamp.v1 import steering_pb2 as pb


class CalibrateVectorOptions(TypedDict, total=False):
    """Options of a calibration.

    effect: what is measured, by a function of patchclamp.effects; by default the projection. layers: by default at most
    8 of the vector. strengths: ascending, by default a tenth to twice the norm of the activations; of "rotate_towards"
    radians. application: how the vector is applied. scope: tokens that are edited, by default every one. instruction:
    what a user could write instead, put before each prompt. random_vectors: how many of equal norm. max_tokens: of each
    text. max_perplexity_ratio, max_repetition: bounds of the safe range. tags: of the vector with its calibration.
    """

    effect: EffectLike | None
    layers: Iterable[int]
    strengths: Iterable[float]
    application: CalibrationApplicationName
    scope: ScopeLike | None
    instruction: str
    random_vectors: int
    max_tokens: int
    max_perplexity_ratio: float | None
    max_repetition: float | None
    seed: int
    tags: Sequence[str]
    replace_tags: bool
    model: str


def calibrate_vector(
    vector: str,
    prompts: Iterable[PromptLike],
    *,
    effect: EffectLike | None = None,
    layers: Iterable[int] = (),
    strengths: Iterable[float] = (),
    application: CalibrationApplicationName = "add",
    scope: ScopeLike | None = None,
    instruction: str = "",
    random_vectors: int = 0,
    max_tokens: int = 0,
    max_perplexity_ratio: float | None = None,
    max_repetition: float | None = None,
    seed: int = 0,
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.CalibrateVectorRequest:
    """Returns a request to calibrate a vector on prompts. Raises ValueError for no prompt."""
    listed = several(prompts, "prompts", "a prompt")
    if not listed:
        raise ValueError("prompts: give at least one")
    if effect is not None:
        instance(effect, pb.EffectMeasure, "effect", "what a function of patchclamp.effects returns")
    request = build(
        pb.CalibrateVectorRequest,
        model=model,
        vector=vector,
        layers=layers,
        strengths=strengths,
        scope=scope_message(scope),
        prompts=[prompt(each, field=f"prompts[{i}]") for i, each in enumerate(listed)],
        max_tokens=max_tokens,
        effect=effect,
        instruction=instruction,
        random_vectors=random_vectors,
        max_perplexity_ratio=max_perplexity_ratio,
        max_repetition=max_repetition,
        seed=seed,
        tags=tags,
        replace_tags=replace_tags,
    )
    setattr(request, value_of(CALIBRATION_APPLICATIONS, application, "application"), True)
    return request


class DetectConceptOptions(TypedDict, total=False):
    """Options of a detection.

    features: of autoencoders, by the id or tag of theirs, each a number or several. layers: by default every layer of a
    detector; a probe reads its layers together. poolings: by default last_token, mean and max. calibration_fraction:
    share of the labelled texts that probabilities are calibrated on, by default half.
    """

    features: Mapping[str, int | Iterable[int]] | None
    layers: Iterable[int]
    poolings: Iterable[DetectionPoolingName]
    calibration_fraction: float | None
    seed: int
    model: str


def detect_concept(
    detectors: str | Iterable[str],
    texts: TextsLike,
    target: str = "",
    *,
    features: Mapping[str, int | Iterable[int]] | None = None,
    layers: Iterable[int] = (),
    poolings: Iterable[DetectionPoolingName] = (),
    calibration_fraction: float | None = None,
    seed: int = 0,
    model: str = "",
) -> pb.DetectConceptRequest:
    """Returns a request to score texts by vectors, probes and features. Raises ValueError for none of them."""
    named = enumerate(several(poolings, "poolings", "a pooling"))
    request = build(
        pb.DetectConceptRequest,
        model=model,
        detectors=one_text_or_several(detectors),
        features=_references({} if features is None else features),
        texts=texts_message(texts),
        target=target,
        layers=layers,
        poolings=[value_of(DETECTION_POOLINGS, name, f"poolings[{i}]") for i, name in named],
        calibration_fraction=calibration_fraction,
        seed=seed,
    )
    if not request.detectors and not request.features:
        raise ValueError("detectors: give the id or tag of at least one vector or probe, or features")
    return request


def _references(features: Mapping[str, int | Iterable[int]]) -> list[program_pb2.FeatureReference]:
    if not isinstance(features, Mapping):
        raise TypeError(f"features: expected {{autoencoder: number or several}}, got {shown(features)}")
    return [
        build_as(
            {"autoencoder": "features", "feature": f"features[{autoencoder!r}]"},
            program_pb2.FeatureReference,
            autoencoder=autoencoder,
            feature=number,
        )
        for autoencoder, numbers in features.items()
        for number in one_or_several(numbers, f"features[{autoencoder!r}]", "an int")
    ]
