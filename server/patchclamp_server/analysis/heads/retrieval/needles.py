"""Plans needle tests: which statements are hidden in which texts, at which lengths and depths.

A needle is a question, a statement that answers it, and the words of the statement that are the answer.
"""

import json
import random
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import product

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo

DEFAULT_LENGTHS = (256, 512, 1024, 1536)
DEFAULT_DEPTHS = (0.1, 0.5, 0.9)
# Default lengths leave so many tokens of the context for the answer.
ANSWER_ROOM = 64
MAX_COMBINATIONS = 100_000
MAX_RUNS = 4096


@dataclass(frozen=True)
class Needle:
    question: str
    needle: str
    answer: str


@dataclass(frozen=True)
class NeedleTest:
    """Has the fields of the message NeedleTest. Empty ones stand for what is built in, a `max_runs` of 0 for all
    runs."""

    haystacks: tuple[str, ...] = ()
    needles: tuple[Needle, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    seed: int = 0
    max_runs: int = 0


@dataclass(frozen=True)
class Placement:
    """One run: the needle by index, the tokens of the prompt, and the depth in the text at which it is hidden."""

    needle: int
    length: int
    depth: float


@dataclass(frozen=True)
class Plan:
    """A test with nothing left open; `placements` are in the order in which they are run."""

    haystacks: tuple[str, ...]
    needles: tuple[Needle, ...]
    placements: tuple[Placement, ...]

    @property
    def digest(self) -> str:
        """Returns the digest of texts and needles."""
        return json_digest([self.haystacks, [asdict(n) for n in self.needles]])

    def card(self) -> dict[str, object]:
        """Returns the test as the provenance of a result keeps it."""
        return {
            "needles": len(self.needles),
            "haystacks": len(self.haystacks),
            "test_digest": self.digest,
            "lengths": sorted({p.length for p in self.placements}),
            "depths": sorted({p.depth for p in self.placements}),
        }


def plan(test: NeedleTest, info: ModelInfo, path: str = "test") -> Plan:
    """Fills in what is built in, checks, and shuffles the runs. Raises InvalidArgument with the field at fault."""
    needles = test.needles or built_in_needles()
    haystacks = test.haystacks or built_in_haystacks()
    context = info.context_length
    lengths = test.lengths or tuple(n for n in DEFAULT_LENGTHS if n + ANSWER_ROOM <= context)
    depths = test.depths or DEFAULT_DEPTHS
    if not lengths:
        raise InvalidArgument(f"{path}.lengths", f"no default fits a context of {context} tokens; name one")
    for i, length in enumerate(lengths):
        if not 1 <= length <= context:
            raise InvalidArgument(f"{path}.lengths[{i}]", f"{length} is not in 1 to {context}, the context length")
    for i, depth in enumerate(depths):
        if not 0.0 <= depth <= 1.0:
            raise InvalidArgument(f"{path}.depths[{i}]", f"{depth:g} is not in 0 (the start) to 1 (the end)")
    for i, needle in enumerate(needles):
        _check_needle(needle, f"{path}.needles[{i}]")
    for i, text in enumerate(haystacks):
        _check_haystack(text, needles, f"{path}.haystacks[{i}]")
    combinations = len(needles) * len(lengths) * len(depths)
    if combinations > MAX_COMBINATIONS:
        raise InvalidArgument(path, f"{combinations} needles x lengths x depths are more than {MAX_COMBINATIONS}")
    placements = [Placement(*chosen) for chosen in product(range(len(needles)), lengths, depths)]
    random.Random(test.seed).shuffle(placements)
    runs = min(test.max_runs or combinations, combinations)
    if runs > MAX_RUNS:
        raise InvalidArgument(f"{path}.max_runs", f"{runs} runs are more than {MAX_RUNS}; set max_runs")
    return Plan(haystacks, needles, tuple(placements[:runs]))


def _check_needle(needle: Needle, path: str) -> None:
    for field, text in asdict(needle).items():
        if not text.strip():
            raise InvalidArgument(f"{path}.{field}", "is empty")
        if text != text.strip():
            raise InvalidArgument(f"{path}.{field}", "begins or ends with white space")
    if needle.answer not in needle.needle:
        raise InvalidArgument(f"{path}.answer", f"{needle.answer!r} does not stand in the needle, word for word")


def _check_haystack(text: str, needles: tuple[Needle, ...], path: str) -> None:
    if not text.strip():
        raise InvalidArgument(path, "is empty")
    for i, needle in enumerate(needles):
        if needle.needle in text:
            raise InvalidArgument(path, f"holds needle {i} already, so the answer would stand in two places")


@cache
def built_in_needles() -> tuple[Needle, ...]:
    """Returns our own needles, about people and places that do not exist."""
    return tuple(Needle(**entry) for entry in json.loads(_data("needles.json")))


@cache
def built_in_haystacks() -> tuple[str, ...]:
    """Returns public-domain prose; data/README.md says what and from where."""
    names = ("mansfield_park", "acts", "persuasion", "samuel")
    return tuple(_data(f"haystacks/{name}.txt") for name in names)


def _data(name: str) -> str:
    return files("patchclamp_server.analysis.heads").joinpath("data", *name.split("/")).read_text(encoding="utf-8")
