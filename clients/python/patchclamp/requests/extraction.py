"""Requests of SteeringService."""

from collections.abc import Iterable, Sequence
from typing import Any

from patchclamp.fields import build, build_as, several, shown
from patchclamp.names import (
    METHODS,
    POOLINGS,
    SITES,
    MethodName,
    PoolingName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.neurons import TextsLike, texts_message
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.prompts import PromptLike, prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import steering_pb2


class ExtractOptions(StoredOptions, total=False):
    """Options of an extraction, besides StoredOptions. Each method takes some of the inputs; pairs are one of them.

    texts: by label, as LocalizeNeurons takes them; those of the label target are positive, those of contrast negative,
    by default those of all other labels. demonstrations: (input, output) of a task vector, or (definition, word) of a
    definition. definition: what the concept is. word_pairs: counterfactual words (positive, negative) of the causal
    inner product.

    site: a residual site, by default resid_post. layers: by default every layer; reft_r1 takes at most 8. scope: tokens
    that are pooled. max_steps, learning_rate, batch_size, patience: of reft_r1, which is trained by Adam, by default
    500, 0.005, 16 and 5 evaluations without a lower held-out loss.
    """

    texts: TextsLike | None
    target: str
    contrast: str
    demonstrations: Iterable[tuple[str, str]]
    definition: str
    word_pairs: Iterable[tuple[str, str]]
    site: SiteName | None
    layers: Iterable[int]
    pooling: PoolingName | None
    scope: ScopeLike | None
    holdout_fraction: float | None
    max_steps: int
    learning_rate: float | None
    batch_size: int
    patience: int
    seed: int
    model: str


def extract_vectors(
    pairs: Iterable[tuple[PromptLike, PromptLike]] = (),
    method: MethodName = "difference_of_means",
    *,
    texts: TextsLike | None = None,
    target: str = "",
    contrast: str = "",
    demonstrations: Iterable[tuple[str, str]] = (),
    definition: str = "",
    word_pairs: Iterable[tuple[str, str]] = (),
    site: SiteName | None = None,
    layers: Iterable[int] = (),
    pooling: PoolingName | None = None,
    scope: ScopeLike | None = None,
    holdout_fraction: float | None = None,
    max_steps: int = 0,
    learning_rate: float | None = None,
    batch_size: int = 0,
    patience: int = 0,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> steering_pb2.ExtractVectorsRequest:
    """Returns a request for a vector from pairs (positive, negative), or from what else the method takes."""
    listed = several(pairs, "pairs", "(positive, negative)")
    shots = several(demonstrations, "demonstrations", "(input, output)")
    words = several(word_pairs, "word_pairs", "(positive, negative)")
    training = build(
        steering_pb2.Training,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        patience=patience,
    )
    return build(
        steering_pb2.ExtractVectorsRequest,
        model=model,
        method=value_of(METHODS, method, "method"),
        pairs=[_pair(pair, f"pairs[{i}]") for i, pair in enumerate(listed)],
        texts=None if texts is None else texts_message(texts),
        target=target,
        contrast=contrast,
        demonstrations=[_demonstration(each, f"demonstrations[{i}]") for i, each in enumerate(shots)],
        definition=definition,
        word_pairs=[_words(each, f"word_pairs[{i}]") for i, each in enumerate(words)],
        site=value_or_unspecified(SITES, site, "site"),
        layers=layers,
        pooling=value_or_unspecified(POOLINGS, pooling, "pooling"),
        scope=scope_message(scope),
        holdout_fraction=holdout_fraction,
        # Methods that are not trained take none, not even an empty one.
        training=training if training.ListFields() else None,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def _pair(pair: Any, field: str) -> steering_pb2.ContrastPair:
    match pair:
        case (positive, negative):
            return steering_pb2.ContrastPair(
                positive=prompt(positive, field=f"{field}[0]"), negative=prompt(negative, field=f"{field}[1]")
            )
        case _:
            raise TypeError(f"{field}: expected (positive, negative), got {shown(pair)}")


def _demonstration(pair: Any, field: str) -> steering_pb2.Demonstration:
    match pair:
        case (given, output):
            names = {"input": f"{field}[0]", "output": f"{field}[1]"}
            return build_as(names, steering_pb2.Demonstration, input=given, output=output)
        case _:
            raise TypeError(f"{field}: expected (input, output), got {shown(pair)}")


def _words(pair: Any, field: str) -> steering_pb2.WordPair:
    match pair:
        case (positive, negative):
            names = {"positive": f"{field}[0]", "negative": f"{field}[1]"}
            return build_as(names, steering_pb2.WordPair, positive=positive, negative=negative)
        case _:
            raise TypeError(f"{field}: expected (positive, negative), got {shown(pair)}")
