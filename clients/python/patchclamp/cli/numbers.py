"""Whole numbers of the command line, in the range that their field has: argparse names the option of a wrong one."""

import argparse
from collections.abc import Callable


def _whole(largest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not 0 <= value <= largest:
            raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {largest}, got {text!r}")
        return value

    return parse


count = _whole(2**31 - 1)
seed = _whole(2**64 - 1)
