"""How a receipt reads."""

from patchclamp.results import EditReceipt, Receipt, RequestWarning


def receipt(*edits: EditReceipt, warnings: tuple[RequestWarning, ...] = ()) -> str:
    return str(Receipt("sha256:0123456789abcdef", edits, touched=True, warnings=warnings))


def test_rows_that_all_came_from_the_prefix_cache_are_not_told_as_a_change_of_nothing():
    text = receipt(EditReceipt("joy", 0, 0.0, 0, 14))
    assert "all 14 token-layer rows came edited from the prefix cache" in text
    assert "0 token-layer rows" not in text
    assert "0.00%" not in text


def test_rows_of_both_are_told_apart():
    text = receipt(EditReceipt("joy", 22, 0.1708, 0, 14))
    assert "22 token-layer rows, mean change 17.08% of the norm, 14 more rows from the prefix cache" in text


def test_a_gate_says_its_threshold_also_when_it_never_opened():
    text = receipt(EditReceipt("joy", 0, 0.0, 0, 0, 12.3412))
    assert text.splitlines()[1] == "  joy: 0 token-layer rows, gate at 12.34 open 0 times"


def test_warnings_follow_the_edits():
    warning = RequestWarning("strong_edit", "program.edits[0]", "too strong")
    text = receipt(EditReceipt("joy", 1, 3.0, 0, 0), warnings=(warning,))
    assert text.splitlines()[-1] == "warning: program.edits[0]: too strong"


def test_a_request_without_edits_can_be_warned():
    warning = RequestWarning("beyond_context", "stop.max_tokens", "too many")
    text = str(Receipt("sha256:0", (), touched=False, warnings=(warning,)))
    assert text.splitlines() == ["receipt: no edits", "warning: stop.max_tokens: too many"]
