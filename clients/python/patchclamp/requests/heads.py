"""Requests of HeadService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.heads import (
    CleanCorruptPair,
    HeadsLike,
    NeedleTest,
    StoppingRule,
    TemporalFact,
    selection_message,
)
from patchclamp.names import (
    CIRCUIT_METHODS,
    HEAD_EDIT_MODES,
    HEAD_SCORE_METHODS,
    CircuitMethodName,
    HeadEditModeName,
    HeadScoreMethodName,
    value_of,
)
from patchclamp.prompts import PromptLike, PromptOptions, prompt
from patchclamp.v1 import head_pb2


class StoredOptions(TypedDict, total=False):
    """tags: names to store the head set under."""

    description: str
    tags: Sequence[str]
    model: str


class DetectOptions(StoredOptions, total=False):
    """threshold: score of a retrieval head. stopping: default run everything; StoppingRule() is its defaults."""

    threshold: float
    stopping: StoppingRule


class HeadScoreOptions(StoredOptions, total=False):
    """ngram: n, of that method. sequence_tokens: before a random sequence repeats. facts: of temporal."""

    ngram: int
    sequence_tokens: int
    sequences: int
    seed: int
    facts: Iterable[TemporalFact]


class HeadEditOptions(TypedDict, total=False):
    """top_k: of a head set, only the k best. scale: of that mode. random_sets: controls of equal size.

    test, texts: what needle success and perplexity are measured on; default those of the server.
    """

    top_k: int
    scale: float
    random_sets: int
    seed: int
    test: NeedleTest
    texts: str | Iterable[str]
    model: str


class CircuitOptions(StoredOptions, total=False):
    """circuit_size: heads whose faithfulness is reported. random_sets: random circuits of equal size."""

    circuit_size: int
    random_sets: int
    seed: int


class AttributeOptions(PromptOptions, total=False):
    """contrast: default none, which attributes logit(target) alone. top_heads: that are split by source token."""

    contrast: str
    top_heads: int


def detect_retrieval_heads(test: NeedleTest | None, options: DetectOptions) -> head_pb2.DetectRetrievalHeadsRequest:
    stopping = options.get("stopping")
    return head_pb2.DetectRetrievalHeadsRequest(
        model=options.get("model", ""),
        test=None if test is None else test.message(),
        threshold=options.get("threshold"),
        stopping=None if stopping is None else stopping.message(),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def score_heads(method: HeadScoreMethodName, options: HeadScoreOptions) -> head_pb2.ScoreHeadsRequest:
    return head_pb2.ScoreHeadsRequest(
        model=options.get("model", ""),
        method=value_of(HEAD_SCORE_METHODS, method, "method"),
        ngram=options.get("ngram", 0),
        sequence_tokens=options.get("sequence_tokens", 0),
        sequences=options.get("sequences", 0),
        seed=options.get("seed", 0),
        facts=[fact.message() for fact in options.get("facts", ())],
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def evaluate_head_edit(
    heads: HeadsLike, mode: HeadEditModeName, options: HeadEditOptions
) -> head_pb2.EvaluateHeadEditRequest:
    """ValueError unless scale comes with the mode "scale", and with no other."""
    if (mode == "scale") != ("scale" in options):
        raise ValueError('scale is given with the mode "scale", and with no other')
    test = options.get("test")
    texts = options.get("texts", ())
    return head_pb2.EvaluateHeadEditRequest(
        model=options.get("model", ""),
        heads=selection_message(heads, options.get("top_k", 0)),
        mode=value_of(HEAD_EDIT_MODES, mode, "mode"),
        scale=options.get("scale", 0.0),
        random_sets=options.get("random_sets", 0),
        seed=options.get("seed", 0),
        test=None if test is None else test.message(),
        texts=[texts] if isinstance(texts, str) else texts,
    )


def find_circuit(
    pairs: Iterable[CleanCorruptPair], method: CircuitMethodName, options: CircuitOptions
) -> head_pb2.FindCircuitRequest:
    return head_pb2.FindCircuitRequest(
        model=options.get("model", ""),
        method=value_of(CIRCUIT_METHODS, method, "method"),
        pairs=[pair.message() for pair in pairs],
        circuit_size=options.get("circuit_size", 0),
        random_sets=options.get("random_sets", 0),
        seed=options.get("seed", 0),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def compare_head_sets(head_sets: Iterable[str], top_k: int) -> head_pb2.CompareHeadSetsRequest:
    """TypeError for one head set in place of several."""
    if isinstance(head_sets, str):
        raise TypeError(f"expected several head sets: [{head_sets!r}, ...]")
    return head_pb2.CompareHeadSetsRequest(head_sets=head_sets, top_k=top_k)


def attribute_logits(
    source: PromptLike | None, target: str, options: AttributeOptions
) -> head_pb2.AttributeLogitsRequest:
    return head_pb2.AttributeLogitsRequest(
        model=options.get("model", ""),
        prompt=prompt(source, options),
        target=target,
        contrast=options.get("contrast", ""),
        top_heads=options.get("top_heads"),
    )
