"""The YAML configuration of QRHead (Zhang et al. 2025) lists query heads, best first:

    attn_head_set: "13-18,13-21,8-11"        <layer>-<head>, both from 0; or "full_heads", all of the model
    model_base_class: "Llama-3.1-8B-Instruct"
    model_name_or_path: "meta-llama/Llama-3.1-8B-Instruct"

The list has no scores. The i-th of its n heads, from 0, gets 1 - i / n, and every other head of the model 0: that keeps
the order and is no measurement. The threshold of the set is 1 / n, so that it selects the list. Export lists the heads
that reach the threshold of a set, best first; their scores have no place.

The heads are those of queries, so that nothing is expanded. Only a mapping of plain texts is read, event by event: no
object is made from a tag, and there are no aliases, which could make a small file large.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from patchclamp_server.artifacts.formats.base import (
    ALONE,
    Beside,
    CannotExpress,
    Decoded,
    MalformedFile,
    known_model,
    whole_file,
)
from patchclamp_server.artifacts.heads import Head, from_threshold, threshold_of
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

LIST, EVERY_HEAD = "attn_head_set", "full_heads"
MODEL_NAMES = ("model_base_class", "model_name_or_path")
HEAD = re.compile(r"(0|[1-9][0-9]{0,5})-(0|[1-9][0-9]{0,5})")
# 5,000 heads take 30 kB; YAML is read a character at a time.
MAX_FILE_BYTES = 256 * 1024


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns "scores" [layers, heads] float32. Raises MalformedFile, which names the head that is wrong."""
    model = known_model(beside, "a list of heads names some of the heads of a model, and all")
    texts = _texts(whole_file(source, "heads", MAX_FILE_BYTES))
    if LIST not in texts:
        raise MalformedFile(f'not a list of heads: expected {LIST}: "<layer>-<head>,..."')
    scores = torch.zeros(model.n_layers, model.n_heads)
    warnings: tuple[str, ...] = ()
    if texts[LIST] == EVERY_HEAD:
        scores += 1
        listed, threshold = scores.numel(), 1.0
    else:
        heads = _heads(texts[LIST], model)
        listed, threshold = len(heads), 1 / len(heads)
        for place, head in enumerate(heads):
            scores[head] = 1 - place / listed
        warnings = ("scores are places in the list, not measurements",)
    provenance = {"method": "imported", "format": "qr_head_yaml", "listed": listed}
    provenance |= {name: texts[name] for name in MODEL_NAMES if name in texts}
    return Decoded({"scores": scores}, provenance=provenance, evidence={"threshold": threshold}, warnings=warnings)


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Returns the list, with the names of the model that it came with, else that of the model served."""
    info = artifact.info
    if info.kind is not ArtifactKind.HEAD_SET:
        raise CannotExpress(f"a list of heads holds a head_set, not a {info.kind.value}")
    try:
        threshold = threshold_of(info.evidence)
    except ValueError as error:
        raise CannotExpress(f"the head set has {error}") from None
    heads = from_threshold(artifact.head_scores()[0], threshold)
    if not heads:
        raise CannotExpress(f"no head reaches the threshold of the set, {threshold:g}: the list would be empty")
    texts = {LIST: ",".join(f"{layer}-{head}" for layer, head in heads)}
    for name in MODEL_NAMES:
        said: Any = info.provenance.get(name, model.name if model is not None else None)
        texts |= {name: said} if isinstance(said, str) else {}
    # A text as JSON writes it is one of YAML.
    return "".join(f"{name}: {json.dumps(text)}\n" for name, text in texts.items()).encode("ascii")


def _texts(data: bytes) -> dict[str, str]:
    """Returns the entries of a mapping of texts."""
    try:
        text = data.decode()
        return _mapping(yaml.parse(text, Loader=yaml.SafeLoader))
    # The scanner makes characters of escapes such as \\UFFFFFFFF, which raise ValueError or OverflowError.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise MalformedFile(f"not YAML: {' '.join(str(error).split())[:200]}") from error


def _mapping(events: Iterator[Any]) -> dict[str, str]:
    for kind in (yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.MappingStartEvent):
        if not isinstance(event := next(events), kind) or _marked(event):
            raise MalformedFile("not a mapping of names and texts")
    entries: dict[str, str] = {}
    while not isinstance(name := next(events), yaml.MappingEndEvent):
        value = next(events)
        for event in (name, value):
            if not isinstance(event, yaml.ScalarEvent) or _marked(event):
                line = event.start_mark.line + 1
                raise MalformedFile(f"line {line}: expected a name and a text, without tag or anchor")
        if name.value in entries:
            raise MalformedFile(f"{name.value!r:.80} is there twice")
        entries[name.value] = value.value
    if not isinstance(next(events), yaml.DocumentEndEvent) or not isinstance(next(events), yaml.StreamEndEvent):
        raise MalformedFile("more than one document")
    return entries


def _marked(event: Any) -> bool:
    return getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None


def _heads(text: str, model: ModelInfo) -> list[Head]:
    heads: dict[Head, None] = {}
    for name in text.split(","):
        match = HEAD.fullmatch(name.strip())
        if match is None:
            raise MalformedFile(f"{name.strip()!r:.80} is not a head; expected <layer>-<head>, or {EVERY_HEAD} alone")
        head = Head(int(match[1]), int(match[2]))
        if head.layer >= model.n_layers or head.head >= model.n_heads:
            raise MalformedFile(
                f"{name.strip()}: {model.name} has layers 0 to {model.n_layers - 1} of heads 0 to {model.n_heads - 1}"
            )
        if head in heads:
            raise MalformedFile(f"{name.strip()} is there twice")
        heads[head] = None
    return list(heads)
