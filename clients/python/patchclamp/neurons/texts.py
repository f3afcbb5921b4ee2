"""Texts by their labels, and facts: what neurons are found on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from patchclamp.fields import build, build_as, several, shown
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import neuron_pb2 as pb

# Label of texts that come without one.
_UNLABELLED = "texts"


@dataclass(frozen=True)
class TextSource:
    """Holds texts that are run; wherever texts are expected, `texts` alone will do.

    texts: {label: texts}, texts without labels, or the id or tag of a stored corpus. A text may be token ids or chat
    turns too. window_tokens: length of the windows that longer texts are cut into. max_tokens: windows are run up to
    the first that reaches so many, by default all.
    """

    texts: "Mapping[str, Iterable[PromptLike]] | Iterable[PromptLike] | str"
    window_tokens: int = 0
    max_tokens: int = 0

    def message(self, field: str = "texts") -> pb.TextSource:
        """Returns the message. `field` is what errors call the texts."""
        settings = build(pb.TextSource, window_tokens=self.window_tokens, max_tokens=self.max_tokens)
        if isinstance(self.texts, str):
            settings.MergeFrom(build_as({"corpus": field}, pb.TextSource, corpus=self.texts))
            return settings
        if isinstance(self.texts, Mapping):
            groups = [_labelled(label, texts, f"{field}[{label!r}]") for label, texts in self.texts.items()]
        else:
            groups = [_labelled(_UNLABELLED, self.texts, field)]
        settings.MergeFrom(pb.TextSource(groups=groups))
        return settings


TextsLike: TypeAlias = TextSource | Mapping[str, Iterable[PromptLike]] | Iterable[PromptLike] | str


def texts_message(texts: TextsLike, field: str = "texts") -> pb.TextSource:
    """Returns the message of texts. Raises TypeError for one text in place of several, ValueError for none."""
    source = texts if isinstance(texts, TextSource) else TextSource(texts)
    message = source.message(field)
    if not message.corpus and not any(group.prompts for group in message.groups):
        raise ValueError(f"{field}: give at least one text, or the id or tag of a corpus")
    return message


@dataclass(frozen=True)
class Fact:
    """Says that the prompt is continued by the answer; (prompt, answer) alone will do.

    candidates: other answers that it is compared with, by default some of the other facts beside it.
    """

    prompt: PromptLike
    answer: str
    candidates: Sequence[str] = ()

    def message(self, parent: str = "") -> pb.Fact:
        """Returns the message. `parent` is the path of the fact in errors, with a dot after it."""
        return build_as(
            {name: parent + name for name in ("answer", "candidates")},
            pb.Fact,
            prompt=prompt(self.prompt, field=f"{parent}prompt"),
            answer=self.answer,
            candidates=self.candidates,
        )


FactLike: TypeAlias = "Fact | tuple[PromptLike, str]"


FactsLike: TypeAlias = "Iterable[FactLike] | Mapping[str, str]"


def fact_messages(facts: FactsLike, field: str) -> list[pb.Fact]:
    """Returns the messages of facts, or of the answers by their prompts. `field` is what errors call them."""
    given = facts.items() if isinstance(facts, Mapping) else facts
    listed = enumerate(several(given, field, "a fact: (prompt, answer)"))
    return [_fact(each, f"{field}[{i}]").message(f"{field}[{i}].") for i, each in listed]


def _fact(fact: Any, field: str) -> Fact:
    match fact:
        case Fact():
            return fact
        case (source, answer):
            return Fact(source, answer)
        case _:
            raise TypeError(f"{field}: expected a Fact or (prompt, answer), got {shown(fact)}")


def _labelled(label: str, texts: object, field: str) -> pb.LabelledTexts:
    listed = enumerate(several(texts, field, "a text"))
    prompts = [prompt(each, field=f"{field}[{i}]") for i, each in listed]
    return build_as({"label": field}, pb.LabelledTexts, label=label, prompts=prompts)
