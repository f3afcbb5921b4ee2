"""Tokens a minute."""

from types import SimpleNamespace

import pytest

from patchclamp_server.security.token_bucket import TokenBucket


def test_a_bucket_begins_full():
    assert TokenBucket(600).seconds_until_ready() == 0.0


def test_what_was_taken_beyond_is_owed_and_paid_at_the_rate():
    bucket = TokenBucket(600)  # 10 a second
    bucket.charge(600 + 49)
    assert bucket.seconds_until_ready() == pytest.approx(5.0, abs=0.5)


def test_a_part_of_the_bucket_is_enough_to_begin():
    bucket = TokenBucket(600)
    bucket.charge(500)
    assert bucket.seconds_until_ready() == 0.0


def test_a_bucket_holds_no_more_than_a_minute_brings(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("patchclamp_server.security.token_bucket.time", SimpleNamespace(monotonic=lambda: now))
    bucket = TokenBucket(600)
    now = 3600.0
    bucket.charge(601)
    assert bucket.seconds_until_ready() == pytest.approx(0.2)
