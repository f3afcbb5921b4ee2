"""Tests: what an edit of neurons should change, and what it should leave as it is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patchclamp.fields import build_as, one_text_or_several, several, shown
from patchclamp.neurons.texts import FactsLike, fact_messages
from patchclamp.prompts import PromptLike, prompt
from patchclamp.v1 import neuron_pb2 as pb


@dataclass(frozen=True)
class FactsTest:
    """Measures the share of facts whose answer beats its candidates, and the log-probability of the answers."""

    name: str
    facts: FactsLike

    def message(self, parent: str = "") -> pb.NeuronTest:
        """Returns the message. `parent` is the path of the test in errors, with a dot after it."""
        facts = pb.FactsTest(facts=fact_messages(self.facts, f"{parent}facts"))
        return build_as({"name": f"{parent}name"}, pb.NeuronTest, name=self.name, facts=facts)


@dataclass(frozen=True)
class TextsTest:
    """Measures the perplexity of texts, and KL(unedited || edited) at their tokens."""

    name: str
    texts: str | Iterable[str]

    def message(self, parent: str = "") -> pb.NeuronTest:
        """Returns the message. `parent` is the path of the test in errors, with a dot after it."""
        texts = build_as({"texts": f"{parent}texts"}, pb.TextsTest, texts=one_text_or_several(self.texts))
        return build_as({"name": f"{parent}name"}, pb.NeuronTest, name=self.name, texts=texts)


@dataclass(frozen=True)
class GenerationTest:
    """Measures greedy text after each prompt: how often it has any of the words, or lies above a probe's midpoint.

    max_tokens: by default 32. probe: id or tag of a vector, which has a midpoint at probe_layer.
    """

    name: str
    prompts: Iterable[PromptLike]
    max_tokens: int = 0
    words: Sequence[str] = ()
    probe: str = ""
    probe_layer: int | None = None

    def message(self, parent: str = "") -> pb.NeuronTest:
        """Returns the message. `parent` is the path of the test in errors, with a dot after it."""
        listed = enumerate(several(self.prompts, f"{parent}prompts", "a prompt"))
        names = ("max_tokens", "words", "probe", "probe_layer")
        generation = build_as(
            {name: parent + name for name in names},
            pb.GenerationTest,
            prompts=[prompt(each, field=f"{parent}prompts[{i}]") for i, each in listed],
            max_tokens=self.max_tokens,
            words=self.words,
            probe=self.probe,
            probe_layer=self.probe_layer,
        )
        return build_as({"name": f"{parent}name"}, pb.NeuronTest, name=self.name, generation=generation)


NeuronTestLike = FactsTest | TextsTest | GenerationTest


def check_messages(tests: NeuronTestLike | Iterable[NeuronTestLike], field: str) -> list[pb.NeuronTest]:
    """Returns the messages of tests; one alone will do. `field` is what errors call them."""
    expected = "a FactsTest, TextsTest or GenerationTest"
    listed = [tests] if isinstance(tests, NeuronTestLike) else several(tests, field, expected)
    for i, each in enumerate(listed):
        if not isinstance(each, NeuronTestLike):
            raise TypeError(f"{field}[{i}]: expected {expected}, got {shown(each)}")
    return [each.message(f"{field}[{i}].") for i, each in enumerate(listed)]
