"""Requests of SparsityService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.prompts import PromptLike, prompt
from patchclamp.sparsity import SparsityLike, sparsity_message
from patchclamp.v1 import sparse_policy_pb2, sparsity_pb2


class EvaluateOptions(TypedDict, total=False):
    """document_tokens: of each document the texts are cut into. text_description: where the text is from."""

    document_tokens: int
    text_description: str
    model: str


class CalibrateOptions(EvaluateOptions, total=False):
    """holdout_fraction: share of the documents that only the quality card sees. tags: names to store it under."""

    holdout_fraction: float
    description: str
    tags: Sequence[str]


def calibrate_profile(
    policy: sparse_policy_pb2.SparsePolicy, texts: str | Iterable[str], options: CalibrateOptions
) -> sparsity_pb2.CalibrateProfileRequest:
    return sparsity_pb2.CalibrateProfileRequest(
        model=options.get("model", ""),
        policy=policy,
        text=_text(texts, options),
        holdout_fraction=options.get("holdout_fraction"),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def evaluate_profile(
    sparsities: Iterable[SparsityLike],
    texts: str | Iterable[str],
    measure_speed: bool,
    options: EvaluateOptions,
) -> sparsity_pb2.EvaluateProfileRequest:
    """TypeError for one sparsity in place of several, ValueError for none."""
    return sparsity_pb2.EvaluateProfileRequest(
        model=options.get("model", ""),
        sparsities=_sparsities(sparsities),
        text=_text(texts, options),
        measure_speed=measure_speed,
    )


def predict_core_neurons(
    prompts: Iterable[PromptLike], sparsity: SparsityLike, layers: Iterable[int], model: str
) -> sparsity_pb2.PredictCoreNeuronsRequest:
    """TypeError for one text in place of several prompts."""
    if isinstance(prompts, str):
        raise TypeError(f"expected several prompts: [{prompts!r}]")
    return sparsity_pb2.PredictCoreNeuronsRequest(
        model=model,
        prompts=[prompt(source, {}) for source in prompts],
        sparsity=sparsity_message(sparsity),
        layers=list(layers),
    )


def _sparsities(sparsities: Iterable[SparsityLike]) -> list[sparse_policy_pb2.Sparsity]:
    if isinstance(sparsities, str):
        raise TypeError(f"expected several sparsities: [{sparsities!r}]")
    messages = [message for message in map(sparsity_message, sparsities) if message is not None]
    if not messages:
        raise ValueError("give at least one sparsity to evaluate")
    return messages


def _text(texts: str | Iterable[str], options: EvaluateOptions) -> sparsity_pb2.SparsityText:
    return sparsity_pb2.SparsityText(
        texts=[texts] if isinstance(texts, str) else texts,
        document_tokens=options.get("document_tokens", 0),
        description=options.get("text_description", ""),
    )
