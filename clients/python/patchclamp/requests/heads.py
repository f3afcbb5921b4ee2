"""Requests of HeadService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.fields import build, instance, instances, one_text_or_several
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
from patchclamp.prompts import Messages, PromptLike, PromptOptions, prompt
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import head_pb2


class DetectOptions(StoredOptions, total=False):
    """Options of a detection, besides StoredOptions.

    threshold: score that makes a retrieval head. stopping: by default everything is run; StoppingRule() has the
    server's defaults.
    """

    model: str
    threshold: float | None
    stopping: StoppingRule | None


class HeadScoreOptions(StoredOptions, total=False):
    """Options of a score of heads, besides StoredOptions.

    ngram: n of the method ngram. sequence_tokens: how many come before a random sequence repeats. facts: those that
    the method temporal needs.
    """

    model: str
    ngram: int
    sequence_tokens: int
    sequences: int
    seed: int
    facts: Iterable[TemporalFact]


class HeadEditOptions(TypedDict, total=False):
    """Options of an evaluation of a head edit.

    top_k: how many of the best heads of a head set are edited. scale: the factor of the mode "scale". random_sets: how
    many controls of equal size there are. test, texts: what needle success and perplexity are measured on, by default
    those of the server.
    """

    top_k: int
    scale: float | None
    random_sets: int
    seed: int
    test: NeedleTest | None
    texts: str | Iterable[str]
    model: str


class CircuitOptions(StoredOptions, total=False):
    """Options of a circuit, besides StoredOptions.

    circuit_size: how many heads' faithfulness is reported. random_sets: how many random circuits of equal size are
    compared with it.
    """

    model: str
    circuit_size: int
    random_sets: int
    seed: int


class AttributeOptions(PromptOptions, total=False):
    """Options of an attribution, besides PromptOptions.

    contrast: by default none, which attributes logit(target) alone. top_heads: how many heads are split by source
    token.
    """

    contrast: str
    top_heads: int | None


def detect_retrieval_heads(
    test: NeedleTest | None = None,
    *,
    threshold: float | None = None,
    stopping: StoppingRule | None = None,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> head_pb2.DetectRetrievalHeadsRequest:
    rule = None if stopping is None else instance(stopping, StoppingRule, "stopping", "a StoppingRule(...)")
    return build(
        head_pb2.DetectRetrievalHeadsRequest,
        model=model,
        test=_needle_test(test),
        threshold=threshold,
        stopping=None if rule is None else rule.message(),
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def score_heads(
    method: HeadScoreMethodName,
    *,
    ngram: int = 0,
    sequence_tokens: int = 0,
    sequences: int = 0,
    seed: int = 0,
    facts: Iterable[TemporalFact] = (),
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> head_pb2.ScoreHeadsRequest:
    return build(
        head_pb2.ScoreHeadsRequest,
        model=model,
        method=value_of(HEAD_SCORE_METHODS, method, "method"),
        ngram=ngram,
        sequence_tokens=sequence_tokens,
        sequences=sequences,
        seed=seed,
        facts=[fact.message() for fact in instances(facts, TemporalFact, "facts", "a TemporalFact(...)")],
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def evaluate_head_edit(
    heads: HeadsLike,
    mode: HeadEditModeName,
    *,
    top_k: int = 0,
    scale: float | None = None,
    random_sets: int = 0,
    seed: int = 0,
    test: NeedleTest | None = None,
    texts: str | Iterable[str] = (),
    model: str = "",
) -> head_pb2.EvaluateHeadEditRequest:
    """Returns a request to edit heads. Raises ValueError unless scale comes with the mode "scale" and no other."""
    number = value_of(HEAD_EDIT_MODES, mode, "mode")
    if (mode == "scale") != (scale is not None):
        raise ValueError('scale is given with the mode "scale", and with no other')
    return build(
        head_pb2.EvaluateHeadEditRequest,
        model=model,
        heads=selection_message(heads, top_k),
        mode=number,
        scale=0.0 if scale is None else scale,
        random_sets=random_sets,
        seed=seed,
        test=_needle_test(test),
        texts=one_text_or_several(texts),
    )


def find_circuit(
    pairs: Iterable[CleanCorruptPair],
    method: CircuitMethodName,
    *,
    circuit_size: int = 0,
    random_sets: int = 0,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> head_pb2.FindCircuitRequest:
    listed = enumerate(instances(pairs, CleanCorruptPair, "pairs", "a CleanCorruptPair(...)"))
    return build(
        head_pb2.FindCircuitRequest,
        model=model,
        method=value_of(CIRCUIT_METHODS, method, "method"),
        pairs=[pair.message(f"pairs[{i}].") for i, pair in listed],
        circuit_size=circuit_size,
        random_sets=random_sets,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def compare_head_sets(head_sets: Iterable[str], top_k: int) -> head_pb2.CompareHeadSetsRequest:
    """Returns a request to compare head sets. Raises TypeError for one in place of several."""
    return build(head_pb2.CompareHeadSetsRequest, head_sets=head_sets, top_k=top_k)


def attribute_logits(
    source: PromptLike | None,
    target: str,
    *,
    messages: Messages | None = None,
    continue_final_message: bool = False,
    model: str = "",
    contrast: str = "",
    top_heads: int | None = None,
) -> head_pb2.AttributeLogitsRequest:
    return build(
        head_pb2.AttributeLogitsRequest,
        model=model,
        prompt=prompt(source, messages=messages, continue_final_message=continue_final_message),
        target=target,
        contrast=contrast,
        top_heads=top_heads,
    )


def _needle_test(test: NeedleTest | None) -> head_pb2.NeedleTest | None:
    return None if test is None else instance(test, NeedleTest, "test", "a NeedleTest(...)").message()
