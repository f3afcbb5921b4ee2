"""Records of watches in the store: whatever was written there, a server reads it or says that it is damaged."""

from typing import Any

import pytest

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.monitoring.stored_run import Report, Said, StoredRun
from patchclamp_server.monitoring.watch import WatchOptions

HUGE = 10**400


def record(**options: Any) -> dict[str, Any]:
    content = StoredRun("sha256:w", WatchOptions("a"), "", 1.0).to_json()
    return {**content, "options": {**content["options"], **options}}


def test_a_record_is_read_as_it_was_written() -> None:
    content = record(window_tokens=9, buckets=[0.0, 1.0], export_items=True)
    assert StoredRun.from_json("a", content).to_json() == {
        **content,
        "options": {**content["options"], "buckets": (0, 1)},
    }


@pytest.mark.parametrize(
    "content",
    [
        record(window_tokens=3.5),
        record(window_tokens=True),
        record(calibration_tokens=3.5),
        record(export_items=HUGE),
        record(export_items="yes"),
        record(sampling_rate="all"),
        record(buckets=[HUGE]),
        {**record(), "started": HUGE},
        {**record(), "started": float("inf")},
    ],
)
def test_a_record_with_a_value_of_another_type_is_damaged(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="'a' in the store is damaged"):
        StoredRun.from_json("a", content)


@pytest.mark.parametrize(("tokens", "reported"), [(float("inf"), 1.0), (1, HUGE)])
def test_a_report_with_numbers_that_there_are_not_is_none(tokens: float, reported: float) -> None:
    content = Report("r", {"a": Said("", 1)}).to_json()
    content["watches"]["a"]["tokens"], content["reported"] = tokens, reported
    assert Report.from_json(content) is None
