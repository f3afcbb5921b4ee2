"""Steering options of the commands that run the model.

--steer VECTOR@LAYERS:STRENGTH[,generated|prompt][,unit]     joyful@10-14:4.0,generated
--clamp L<layer>N<neurons>[@SITE]=VALUE|MIN..MAX[,generated|prompt]
                                                             L12N345=3.0   L12N3,7=..0   L12N345@mlp_gate=0
--clamp NEURON_SET[@SITE][=VALUE|MIN..MAX][,generated|prompt]
                                                             dog   dog=..0,generated
--features AUTOENCODER#FEATURES[@SITE]=VALUE|MIN..MAX[,generated|prompt]
                                                             sae#345=8.0   sae#3,7@mlp_out=..0
--program FILE                                               protobuf JSON of the message Program
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from patchclamp.cli.files import parsed_file
from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs import (
    Program,
    Scope,
    add,
    clamp_features,
    clamp_neurons,
    everything,
    generated,
    prompt,
    set_features,
    set_neurons,
    vector,
)
from patchclamp.programs.edits import Layers
from patchclamp.v1 import program_pb2 as pb

_NEURON_SITES: Mapping[str, SiteName] = {"mlp_gate": "mlp_gate", "mlp_up": "mlp_up", "mlp_post": "mlp_post"}
_SCOPES = {"generated": generated, "prompt": prompt}
# Neurons of a layer, at a site other than mlp_post where one is named.
NEURONS = r"L(?P<layer>\d+)N(?P<neurons>\d+(,\d+)*)(@(?P<site>\w+))?"
_CLAMP = re.compile(NEURONS + r"=(?P<value>[^,]+)(?P<options>(,[a-z]+)*)")
# The id or tag of a neuron set, whose own values hold where none is given; not what begins as a neuron does.
_CLAMP_SET = re.compile(
    r"(?P<set>(?!L?\d+N\d*([,@=]|$))[A-Za-z0-9][\w.:-]*)(@(?P<site>\w+))?(=(?P<value>[^,]+))?(?P<options>(,[a-z]+)*)"
)
# Features of an autoencoder, by its id or tag, at a site other than resid_post where one is named.
AUTOENCODER = r"(?P<ref>[A-Za-z0-9][\w.:-]*)#(?P<features>\d+(,\d+)*)"
_FEATURES = re.compile(AUTOENCODER + r"(@(?P<site>\w+))?=(?P<value>[^,]+)(?P<options>(,[a-z]+)*)")


def add_steering_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is done to the model", "may be given several times; applied in this order")
    group.add_argument("--program", type=program_file, metavar="FILE", help="program in protobuf JSON")
    group.add_argument(
        "--steer",
        type=steer,
        action="append",
        default=[],
        metavar="VECTOR@LAYERS:STRENGTH[,generated]",
        help="add a stored vector to the residual stream, as in joyful@10-14:4.0",
    )
    group.add_argument(
        "--clamp",
        type=clamp,
        action="append",
        default=[],
        metavar="L<layer>N<neuron>[@SITE]=VALUE|MIN..MAX",
        help="hold a neuron at a value or within bounds, as in L12N345=3.0 or L12N345=..0; with @mlp_gate or @mlp_up "
        "behind it what it is made of; or NEURON_SET: each neuron of a stored set at the value that it has there",
    )
    group.add_argument(
        "--features",
        type=features,
        action="append",
        default=[],
        metavar="AUTOENCODER#FEATURES[@SITE]=VALUE|MIN..MAX",
        help="hold features of a stored autoencoder at a value or within bounds, as in sae#345=8.0 or sae#3,7=..0; its "
        "site, if it is not resid_post, comes behind @",
    )


def program_of(args: argparse.Namespace) -> Program:
    """Returns the file's program, then --steer, --clamp and --features; edits of the same name are numbered."""
    base: Program = args.program or Program()
    edits = [*base.edits, *args.steer, *args.clamp, *args.features]
    return Program(_with_unique_names(edits), readouts=base.readouts, abort_when=base.abort_when)


def steer(text: str) -> pb.Edit:
    """Reads an edit such as joyful@10-14:4.0,generated."""
    ref, at, rest = text.rpartition("@")
    layers, _, options = rest.partition(":")
    if not (at and ref and layers):
        raise argparse.ArgumentTypeError(f"{text!r} is not VECTOR@LAYERS:STRENGTH, such as joyful@10-14:4.0")
    strength, *words = options.split(",") if options else ["1"]
    scope = _scope([word for word in words if word != "unit"], text)
    direction = vector(ref, unit="unit" in words)
    with _about(text):
        return add(
            direction,
            layers=layer_list(layers),
            strength=_number(strength, "strength"),
            scope=scope,
            name=f"{ref}@{layers}",
        )


def clamp(text: str) -> pb.Edit:
    """Reads an edit such as L12N345=3.0,generated or L12N3,7@mlp_gate=-1..1, or dog or dog=..0 of a stored set."""
    match = _CLAMP.fullmatch(text)
    stored = None if match else _CLAMP_SET.fullmatch(text)
    found = match or stored
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither L<layer>N<neuron>=VALUE, such as L12N345=3.0, nor the id or tag of a neuron set"
        )
    chosen: str | list[int] = found["set"] if stored else [int(n) for n in found["neurons"].split(",")]
    scope = _scope(found["options"].split(",")[1:], text)
    site = neuron_site(found["site"], text)
    layers = () if stored else int(found["layer"])
    name = text.partition("=")[0] if found["value"] else text.partition(",")[0]
    low, bounds, high = (found["value"] or "").partition("..")
    with _about(text):
        if not bounds:
            values = _number(low, "value") if low else ()
            return set_neurons(chosen, values, layers=layers, site=site, scope=scope, name=name)
        return clamp_neurons(
            chosen,
            min=_number(low, "min") if low else None,
            max=_number(high, "max") if high else None,
            layers=layers,
            site=site,
            scope=scope,
            name=name,
        )


def features(text: str) -> pb.Edit:
    """Reads an edit such as sae#345=8.0,generated or sae#3,7@mlp_out=..0."""
    found = _FEATURES.fullmatch(text)
    if found is None:
        message = f"{text!r} is not AUTOENCODER#FEATURES=VALUE or =MIN..MAX, such as sae#345=8.0 or sae#3,7=..0"
        raise argparse.ArgumentTypeError(message)
    numbers = [int(number) for number in found["features"].split(",")]
    scope = _scope(found["options"].split(",")[1:], text)
    low, bounds, high = found["value"].partition("..")
    with _about(text):
        edit = (
            clamp_features(
                found["ref"],
                numbers,
                min=_number(low, "min") if low else None,
                max=_number(high, "max") if high else None,
                scope=scope,
                name=text.partition("=")[0],
            )
            if bounds
            else set_features(found["ref"], numbers, _number(low, "value"), scope=scope, name=text.partition("=")[0])
        )
        # The builders take the names of sites from code; this one is what somebody typed.
        edit.site = value_of(SITES, found["site"] or "resid_post", "site")
    return edit


def neuron_site(word: str | None, text: str) -> SiteName:
    """The site that is named, by default mlp_post."""
    try:
        return _NEURON_SITES[word or "mlp_post"]
    except KeyError:
        accepted = ", ".join(_NEURON_SITES)
        raise argparse.ArgumentTypeError(f"{text!r}: {word!r} is no site of neurons; accepted: {accepted}") from None


def program_file(path: str) -> Program:
    return parsed_file(path, Program.from_json)


def layer_list(text: str) -> Layers:
    """Reads "all", "10", "10-14" (both ends included) or "8,10-12"."""
    if text == "all":
        return "all"
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f'layers {text!r}: expected 10, 10-14, 8,10-12 or "all"')
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise argparse.ArgumentTypeError(f"layers {text!r}: {last} is below {first}")
        layers.extend(range(first, last + 1))
    return layers


@contextmanager
def _about(text: str) -> Iterator[None]:
    """Blames this argument for what a builder refuses."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _scope(words: Iterable[str], text: str) -> Scope:
    scope = everything()
    for word in words:
        if word not in _SCOPES:
            raise argparse.ArgumentTypeError(f"{text!r}: {word!r} is unknown; accepted: generated, prompt")
        if scope.include:
            raise argparse.ArgumentTypeError(f"{text!r}: give one of generated and prompt")
        scope = _SCOPES[word]()
    return scope


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{what} {text!r} is not a number") from None


def _with_unique_names(edits: Iterable[pb.Edit]) -> list[pb.Edit]:
    named: list[pb.Edit] = []
    names: set[str] = set()
    for edit in edits:
        copy = pb.Edit()
        copy.CopyFrom(edit)
        number = 1
        while copy.name and copy.name in names:
            number += 1
            copy.name = f"{edit.name}#{number}"
        names.add(copy.name)
        named.append(copy)
    return named
