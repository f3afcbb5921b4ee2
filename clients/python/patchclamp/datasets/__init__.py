"""Small data sets that neurons are found and tested with, ready for localize_neurons and evaluate_neuron_edit.

from patchclamp import datasets
from patchclamp.neurons import FactsTest, average_precision

known, held_out = datasets.load("relations").halves()
client.localize_neurons(average_precision(known.texts, "capital"), tags=["capital"]).result()
client.evaluate_neuron_edit("capital", "zero", FactsTest("capital", held_out.facts["capital"])).result()

relations: facts of countries. languages: the Declaration of Human Rights in six. sentences: beside lists of non-words.
code: beside prose. sentiment: joyful and unhappy sentences. LICENSES.md has sources and licences.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from patchclamp.neurons import Fact

_SUFFIX = ".json"


@dataclass(frozen=True)
class Dataset:
    """Holds texts by label. Of facts, the texts are their prompts."""

    name: str
    about: str
    license: str
    source: str
    texts: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, tuple[Fact, ...]] = field(default_factory=dict)

    def halves(self) -> "tuple[Dataset, Dataset]":
        """Returns two data sets, with every other text of each label: to find neurons, and to test them.

        In both, texts and facts of all labels that have one index are about one matter where they are here.
        """
        first, second = (
            replace(self, texts=_every_other(self.texts, start), facts=_every_other(self.facts, start))
            for start in (0, 1)
        )
        return first, second


def names() -> tuple[str, ...]:
    """Returns the names of all data sets."""
    found = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def load(name: str) -> Dataset:
    """Returns a data set. Raises ValueError for a name that none has."""
    if name not in names():
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(names())}")
    stored: dict[str, Any] = json.loads((files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))
    listed = stored.pop("facts", {})
    texts = stored.pop("texts", {}) or {label: [each["prompt"] for each in own] for label, own in listed.items()}
    return Dataset(
        texts={label: tuple(own) for label, own in texts.items()},
        facts={label: tuple(Fact(**each) for each in own) for label, own in listed.items()},
        **stored,
    )


def _every_other(groups: Mapping[str, tuple[Any, ...]], start: int) -> dict[str, tuple[Any, ...]]:
    return {label: own[start::2] for label, own in groups.items()}
