"""What is watched, in one argument each: [NAME=]WHAT[:THRESHOLD], the threshold a number or a percentile of its values.

--neurons     L12N345    suspects=L12N3,345:1.5         L12N345@mlp_gate
--neuron-set  toxic      toxic:p99.9
--direction   joyful@16  joy=joyful@14-16:p95     joyful (at its own layers)
--probe       rude       rude:.8
--features    sae#345       topics=sae#3,7:2.5
--heads       L18H6,L17H3:.5    copying=retrieval
"""

import argparse
import re
from collections.abc import Callable

from patchclamp.cli.heads.selection import heads
from patchclamp.cli.steering import AUTOENCODER, NEURONS, layer_list, neuron_site
from patchclamp.monitoring import (
    Threshold,
    quantile_of,
    watch_autoencoder,
    watch_direction,
    watch_heads,
    watch_neuron_set,
    watch_neurons,
    watch_probe,
)
from patchclamp.v1 import monitoring_pb2 as pb

_SPEC = re.compile(r"((?P<name>[^=:]+)=)?(?P<what>(sha256:)?[^:=]+)(:(?P<threshold>[^:=]+))?")
_NEURONS = re.compile(NEURONS)
_FEATURES = re.compile(AUTOENCODER)


def neurons(text: str) -> pb.WatchItem:
    """Reads neurons of one layer. By default L12N3,345 has the name L12, and L12N345 its own; a site comes last."""
    name, what, threshold = _parts(text, "L12N345 or suspects=L12N3,345:1.5")
    match = _NEURONS.fullmatch(what)
    if match is None:
        raise argparse.ArgumentTypeError(f"{what!r}: expected neurons of one layer, such as L12N3,345")
    listed = [int(neuron) for neuron in match["neurons"].split(",")]
    site = neuron_site(match["site"], text) if match["site"] else None
    default = what if len(listed) == 1 else f"L{match['layer']}" + (f"@{site}" if site else "")
    return watch_neurons(name or default, int(match["layer"]), listed, site=site, threshold=threshold)


def neuron_set(text: str) -> pb.WatchItem:
    name, what, threshold = _parts(text, "toxic or toxic:p99")
    return watch_neuron_set(name or _short(what), what, threshold=threshold)


def direction(text: str) -> pb.WatchItem:
    """Reads a direction such as joyful@14-16; without layers it is watched at those that the vector has."""
    name, what, threshold = _parts(text, "joyful@16 or joy=joyful@14-16:p99")
    ref, _, layers = what.partition("@")
    found = layer_list(layers) if layers else ()
    if isinstance(found, str):
        raise argparse.ArgumentTypeError(f'{text!r}: name the layers; a vector without them has all its own, not "all"')
    return watch_direction(name or _short(ref), ref, layers=found, threshold=threshold)


def probe(text: str) -> pb.WatchItem:
    name, what, threshold = _parts(text, "rude or rude:.8")
    return watch_probe(name or _short(what), what, threshold=threshold)


def features(text: str) -> pb.WatchItem:
    """Reads features of a stored autoencoder by their numbers, such as sae#345."""
    name, what, threshold = _parts(text, "sae#345 or topics=sae#3,7:2.5")
    match = _FEATURES.fullmatch(what)
    if match is None:
        raise argparse.ArgumentTypeError(f"{what!r}: expected features of an autoencoder, such as sae#3,7")
    listed = [int(feature) for feature in match["features"].split(",")]
    default = _short(match["ref"]) + (f"#{listed[0]}" if len(listed) == 1 else "")
    return watch_autoencoder(name or default, match["ref"], listed, threshold=threshold)


def head_list(text: str) -> pb.WatchItem:
    name, what, threshold = _parts(text, "L18H6,L17H3 or copying=retrieval:.5")
    listed = heads(what)
    default = _short(what) if isinstance(listed, str) or "," not in what else "heads"
    return watch_heads(name or default, listed, threshold=threshold)


# Option, what reads it, metavar and help.
ITEM_OPTIONS: tuple[tuple[str, Callable[[str], pb.WatchItem], str, str], ...] = (
    ("--neurons", neurons, "[NAME=]L<layer>N<neurons>[@SITE][:THRESHOLD]", "neurons of a layer, as in L12N3,345:1.5"),
    ("--neuron-set", neuron_set, "[NAME=]SET[:THRESHOLD]", "all neurons of a stored set"),
    ("--direction", direction, "[NAME=]VECTOR[@LAYERS][:THRESHOLD]", "projections on a stored vector"),
    ("--probe", probe, "[NAME=]PROBE[:THRESHOLD]", "probabilities of a stored probe"),
    (
        "--features",
        features,
        "[NAME=]AUTOENCODER#FEATURES[:THRESHOLD]",
        "features of a stored autoencoder, as in sae#3,7",
    ),
    (
        "--heads",
        head_list,
        "[NAME=]HEADS|HEAD_SET[:THRESHOLD]",
        "largest attention off the first token, as in L18H6:.5",
    ),
)


def _parts(text: str, example: str) -> tuple[str, str, Threshold | None]:
    match = _SPEC.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected something like {example}")
    return match["name"] or "", match["what"], _threshold(text, match["threshold"])


def _threshold(text: str, given: str | None) -> Threshold | None:
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        pass
    try:
        quantile_of(given)
    except ValueError:
        message = f"{text!r}: the threshold {given!r} is neither a number nor a percentile such as p99"
        raise argparse.ArgumentTypeError(message) from None
    return given


def _short(ref: str) -> str:
    """Returns a name for a tag, which is one, or for an id, by its first digits."""
    return ref.removeprefix("sha256:")[:12] if ref.startswith("sha256:") else ref
