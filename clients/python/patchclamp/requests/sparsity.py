"""Requests of SparsityService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.fields import build, build_as, one_text_or_several, several
from patchclamp.prompts import PromptLike, prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.sparsity import SparsityLike, sparsity_message
from patchclamp.v1 import sparse_policy_pb2, sparsity_pb2


class EvaluateOptions(TypedDict, total=False):
    """Options of an evaluation.

    document_tokens: length of each document that the texts are cut into. text_description: where the text is from.
    """

    document_tokens: int
    text_description: str
    model: str


class CalibrateOptions(EvaluateOptions, StoredOptions, total=False):
    """Options of a calibration, besides EvaluateOptions and StoredOptions.

    holdout_fraction: share of the documents that only the quality card sees.
    """

    holdout_fraction: float | None


def calibrate_profile(
    policy: sparse_policy_pb2.SparsePolicy,
    texts: str | Iterable[str],
    *,
    document_tokens: int = 0,
    text_description: str = "",
    model: str = "",
    holdout_fraction: float | None = None,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
) -> sparsity_pb2.CalibrateProfileRequest:
    return build(
        sparsity_pb2.CalibrateProfileRequest,
        model=model,
        policy=policy,
        text=_text(texts, document_tokens, text_description),
        holdout_fraction=holdout_fraction,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def evaluate_profile(
    sparsities: Iterable[SparsityLike],
    texts: str | Iterable[str],
    *,
    measure_speed: bool = False,
    document_tokens: int = 0,
    text_description: str = "",
    model: str = "",
) -> sparsity_pb2.EvaluateProfileRequest:
    """Returns a request to evaluate sparsities. Raises TypeError for one in place of several, ValueError for none."""
    return build(
        sparsity_pb2.EvaluateProfileRequest,
        model=model,
        sparsities=_sparsities(sparsities),
        text=_text(texts, document_tokens, text_description),
        measure_speed=measure_speed,
    )


def predict_core_neurons(
    prompts: Iterable[PromptLike], sparsity: SparsityLike, layers: Iterable[int], model: str
) -> sparsity_pb2.PredictCoreNeuronsRequest:
    """Returns a request for the neurons of prompts. Raises TypeError for one text in place of several prompts."""
    listed = several(prompts, "prompts", "a prompt")
    return build(
        sparsity_pb2.PredictCoreNeuronsRequest,
        model=model,
        prompts=[prompt(source, field=f"prompts[{i}]") for i, source in enumerate(listed)],
        sparsity=sparsity_message(sparsity),
        layers=layers,
    )


def _sparsities(sparsities: Iterable[SparsityLike]) -> list[sparse_policy_pb2.Sparsity]:
    messages = []
    for i, each in enumerate(several(sparsities, "sparsities", "a policy or profile")):
        message = sparsity_message(each, f"sparsities[{i}]")
        if message is None:
            raise TypeError(f"sparsities[{i}]: expected a policy or profile, got None")
        messages.append(message)
    if not messages:
        raise ValueError("give at least one sparsity to evaluate")
    return messages


def _text(texts: str | Iterable[str], document_tokens: int, description: str) -> sparsity_pb2.SparsityText:
    return build_as(
        {"description": "text_description"},
        sparsity_pb2.SparsityText,
        texts=one_text_or_several(texts),
        document_tokens=document_tokens,
        description=description,
    )
