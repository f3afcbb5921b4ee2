"""How arguments are read. A wrong use is one line, of the command it is about, with what was probably meant."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong.

    argparse prints the usage of twenty lines before the reason, and lets the outermost parser complain.
    """

    def __init__(self, **options: Any) -> None:
        # An abbreviation that is clear today is ambiguous, or means another option, when one more has come.
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Parses all arguments, and leaves none over for the parser around this one."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def _meant(self, option: str) -> str:
        close = difflib.get_close_matches(option.partition("=")[0], self._option_string_actions, n=1)
        return f" (did you mean {close[0]}?)" if close else ""


def _whole(largest: int, smallest: int = 0) -> Callable[[str], int]:
    """Returns what reads a whole number in the range of its field: argparse names the option of a wrong one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} to {largest}, got {text!r}")
        return value

    return parse


class TokenBias(argparse.Action):
    """Gathers ID=BIAS of all its uses."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        id, _, bias = str(values).partition("=")
        try:
            found = {int(id): float(bias)}
        except ValueError:
            raise argparse.ArgumentError(self, f"expected ID=BIAS, such as 42=-100, got {values!r}") from None
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **found})


count = _whole(2**31 - 1)
seed = _whole(2**64 - 1)
offset = _whole(2**31 - 1, -(2**31))
