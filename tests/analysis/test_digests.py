"""Digests that provenance keeps."""

import hashlib

from patchclamp_server.analysis.digests import json_digest


def test_a_digest_is_that_of_the_value_as_json_without_spaces() -> None:
    assert json_digest([((1, 2), (3,))]) == "sha256:" + hashlib.sha256(b"[[[1,2],[3]]]").hexdigest()


def test_values_of_the_same_numbers_in_other_groups_have_other_digests() -> None:
    assert json_digest([[1, 2], [3]]) != json_digest([[1], [2, 3]])
