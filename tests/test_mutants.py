"""The planted defects of planted/ still fit the server: `python tests/mutants.py` plants them, which takes minutes."""

from collections import Counter
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant, occurrences, source

import patchclamp_server

PACKAGE = Path(patchclamp_server.__file__).parent
every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@every_mutant
def test_the_text_to_replace_is_there_exactly_once(mutant: Mutant) -> None:
    assert occurrences(mutant) == 1
    assert mutant.new != mutant.old


@every_mutant
def test_a_server_with_the_defect_is_still_python(mutant: Mutant) -> None:
    text = source(mutant).read_text()
    compile(text.replace(mutant.old, mutant.new), mutant.module, "exec")


@every_mutant
def test_the_named_tests_exist(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        text = (Path(__file__).parent / file).read_text()
        assert not function or f"def {function.partition('[')[0]}(" in text


def test_names_are_unique() -> None:
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_every_package_of_the_server_has_some() -> None:
    planted = Counter(mutant.module.split(".")[1] for mutant in MUTANTS)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(MUTANTS) >= 40
    assert packages <= {name for name, n in planted.items() if n >= 2}
