"""The planted bugs of mutations.py: none is stale, every op has some, and a few are planted for real in every run."""

from pathlib import Path

import pytest
from mutate import ROOT, Verdict, occurrences, plant, without_bug
from mutations import MUTATIONS, Mutation

from patchclamp_kernels import ops

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
# One of each kind that every kernel could have: the last block, a mask, an accumulator, the map of heads.
PLANTED = ["attention-last-block", "attention-mask", "attention-stale-accumulator", "attention-gqa-map"]

every_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(MUTATIONS)


@every_mutation
def test_the_text_to_replace_is_there_exactly_once(mutation: Mutation) -> None:
    assert occurrences(mutation) == 1
    assert mutation.new != mutation.old


@every_mutation
def test_the_named_tests_exist(mutation: Mutation) -> None:
    for test in mutation.tests:
        file, _, function = test.partition("::")
        text = (Path(__file__).parent / file).read_text()
        assert f"def {function.partition('[')[0]}" in text


@pytest.mark.parametrize("op", ops.OPS)
def test_every_op_has_at_least_two_planted_bugs(op: str) -> None:
    of_op = [m for m in MUTATIONS if m.file == f"{op}.py" or m.file.startswith(f"{op}/")]
    assert len(of_op) >= 2


def test_a_bug_that_is_none_survives() -> None:
    """The tests of the planted ones are green on an untouched copy: red means that the bug was seen."""
    tests = sorted({test for name in PLANTED for test in BY_NAME[name].tests})
    assert without_bug(tests) is Verdict.SURVIVED


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    assert plant(BY_NAME[name]).caught


def test_a_text_that_is_not_there_is_stale() -> None:
    mutation = BY_NAME[PLANTED[0]]
    missing = Mutation("missing", mutation.file, "no such text in any kernel", "", "", mutation.tests)
    assert plant(missing) is Verdict.STALE


def test_tests_that_do_not_exist_catch_nothing() -> None:
    mutation = BY_NAME[PLANTED[0]]
    astray = Mutation("astray", mutation.file, mutation.old, mutation.new, "", ("test_guards.py::test_of_nothing",))
    assert plant(astray) is Verdict.BROKEN


def test_the_working_tree_is_left_alone() -> None:
    """Bugs go into copies: the package under test is still the repository's."""
    import patchclamp_kernels

    assert ROOT in Path(patchclamp_kernels.__file__).parents
