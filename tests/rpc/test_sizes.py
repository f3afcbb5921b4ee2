import pytest

from patchclamp_server.sizes import parse_size, shown_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("3KiB", 3072),
        ("2TiB", 2 << 40),
        ("4GB", 4 * 10**9),
        ("0.5kb", 500),
        ("100B", 100),
    ],
)
def test_a_size_is_exact(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "4G", "GiB", "-1GiB", "1e9B", "4GiBs", "", "4,5GiB"])
def test_what_is_no_size_is_told_what_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a number and a unit, such as 4GiB.*units are B, KiB, MiB"):
        parse_size(text)


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match=r"whole number of bytes, got '0.3B'"):
        parse_size("0.3B")


def test_nothing_is_no_size() -> None:
    with pytest.raises(ValueError, match="above 0, got '0GiB'"):
        parse_size("0GiB")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (300 << 20, "300 MiB"), (5 << 40, "5.00 TiB")]
)
def test_a_size_is_shown_with_three_digits(size: int, text: str) -> None:
    assert shown_size(size) == text
