"""Neurons and heads by their places in a line of text, as people write them: L29N808,L3N5."""

import re


def listed_places(text: str, letter: str) -> list[tuple[int, int]] | None:
    """Returns (layer, number) of each place where the text lists some of this letter, or None, as for a tag."""
    place = rf"L(\d+){letter}(\d+)"
    if re.fullmatch(rf"{place}(,\s*{place})*", text) is None:
        return None
    return [(int(layer), int(number)) for layer, number in re.findall(place, text)]
