"""Rates of the peers as a picture: a point for each in each case, on a logarithmic axis."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchclamp.pictures.figure import new_figure
from peers.cases import LONGEST, decode_name
from peers.environments import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    decode_name(1, "unsteered"): "1 request",
    decode_name(1, "all layers"): "1, steered at all layers",
    decode_name(8, "unsteered"): "8 requests",
    decode_name(16, "unsteered"): "16 requests",
    decode_name(16, "programs"): "16, different programs",
    decode_name(64, "unsteered"): "64 requests",
    decode_name(64, "programs"): "64, different programs",
    f"decode at {LONGEST}": f"1 after {LONGEST:,} tokens",
    "prefill 512": "prompt of 512",
    "prefill 2048": "prompt of 2,048",
    f"prefill {LONGEST}": f"prompt of {LONGEST:,}",
}
_MARKERS = "osv^DPX"


def rates_figure(result: Mapping[str, Any]) -> "Figure":
    """Draws tokens a second of every case in SHOWN that was measured; a line between quartiles."""
    cases = [name for name in SHOWN if name in result["figures"]]
    figure = new_figure(8, 0.42 * len(cases) + 1.6)
    axes = figure.subplots()
    for number, peer in enumerate(result["peers"]):
        cards = [result["figures"][name][peer] for name in cases]
        points = [(row, card) for row, card in enumerate(cards) if card["value"] is not None]
        if not points:
            continue
        rows, values = [row for row, _ in points], [card["value"] for _, card in points]
        axes.hlines(rows, *zip(*(card["quartiles"] for _, card in points), strict=True), color=f"C{number}")
        axes.plot(
            values,
            rows,
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=9 if peer == OURS else 6,
            color=f"C{number}",
            label=peer,
        )
    axes.set_xscale("log")
    axes.set_xlabel("tokens a second")
    axes.set_yticks(range(len(cases)), [SHOWN[name] for name in cases])
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", linewidth=0.4)
    axes.legend(fontsize="small")
    return figure
