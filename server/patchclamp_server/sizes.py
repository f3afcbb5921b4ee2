"""Sizes of memory as people write and read them: 4GiB, 512MiB, 3e9 bytes are 3GB."""

import re
from fractions import Fraction

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_UNITS = {"B": 1, **{f"{prefix}iB": 1 << 10 * i for i, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_ACCEPTED = "a number and a unit, such as 4GiB, 1.5GiB, 512MiB or 4GB"


def parse_size(text: str) -> int:
    """Returns the bytes of a size above 0: KiB to TiB are powers of 1024, KB to TB of 1000. Raises ValueError for
    others, and for a part of a byte."""
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): bytes for unit, bytes in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"expected {_ACCEPTED}, got {text!r}; units are {', '.join(_UNITS)}")
    size = Fraction(match[1]) * units[match[2].lower()]
    if size <= 0:
        raise ValueError(f"expected a size above 0, got {text!r}")
    if size.denominator != 1:
        raise ValueError(f"expected a whole number of bytes, got {text!r}")
    return int(size)


def shown_size(size: int) -> str:
    """Returns a size with three digits, as 1.21 GiB; less than a KiB in bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= _UNITS[unit]:
            number = size / _UNITS[unit]
            return f"{number:.{max(0, 3 - len(str(int(abs(number)))))}f} {unit}"
    return f"{size} B"
