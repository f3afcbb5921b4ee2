"""The sample of a wide product of parameters."""

from itertools import product

import pytest
from sampling import drawn

CASES = [{"family": family, "kind": kind, "how": how} for family, kind, how in product(range(11), range(23), range(2))]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_every_value_of_every_parameter_is_in_the_sample(share: float) -> None:
    sample = drawn(CASES, share, "0")
    for name, values in (("family", 11), ("kind", 23), ("how", 2)):
        assert {CASES[index][name] for index in sample} == set(range(values))
    assert len(sample) <= max(round(share * len(CASES)), 11 + 23 + 2)


def test_a_sample_has_the_share_that_was_asked_for_and_no_case_twice() -> None:
    sample = drawn(CASES, 0.25, "0")
    assert len(set(sample)) == len(sample) == round(0.25 * len(CASES))
    assert sample == sorted(sample)


def test_a_seed_gives_the_same_sample_and_another_one_another() -> None:
    assert drawn(CASES, 0.25, "0") == drawn(CASES, 0.25, "0") != drawn(CASES, 0.25, "1")


def test_of_all_nothing_is_left_out() -> None:
    assert drawn(CASES, 1.0, "0") == list(range(len(CASES)))
