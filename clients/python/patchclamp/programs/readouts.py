"""What is read while the model runs, and streamed with the tokens it belongs to. Seen after all edits of the site."""

from collections.abc import Iterable
from typing import TypedDict, Unpack

from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.edits import Layers, layer_fields
from patchclamp.programs.scopes import Scope, scope_message
from patchclamp.programs.vectors import VectorLike, vector
from patchclamp.v1 import program_pb2 as pb


class ReadoutOptions(TypedDict, total=False):
    """layers: one layer, several, or "all". scope: default every token. name: shown with the values."""

    layers: Layers
    scope: Scope
    name: str


def read_projection(
    directions: Iterable[VectorLike], *, site: SiteName = "resid_post", **options: Unpack[ReadoutOptions]
) -> pb.Readout:
    """h·v/|v| for each vector, on the scale of when(), abort_when() and watched directions.

    Multiply by |v| for h·v: `norm` of the evidence of an extracted vector.
    """
    if isinstance(directions, str):
        raise TypeError(f"expected several vectors: [{directions!r}]")
    kind = pb.ProjectionReadout(vectors=[vector(d) for d in directions])
    return _readout(options, site, pb.Readout(projection=kind))


def read_neurons(neurons: Iterable[int], **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """Values of chosen neurons."""
    return _readout(options, "mlp_post", pb.Readout(neurons=pb.NeuronReadout(neurons=list(neurons))))


def read_top_neurons(k: int, **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """The k neurons with the largest absolute value."""
    return _readout(options, "mlp_post", pb.Readout(top_neurons=pb.TopNeuronsReadout(k=k)))


def read_logit_lens(k: int, *, site: SiteName = "resid_post", **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """The k most likely tokens when this residual state is read by the final norm and unembedding."""
    return _readout(options, site, pb.Readout(logit_lens=pb.LogitLensReadout(k=k)))


def read_heads(heads: Iterable[int] = (), **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """For each head (default: all) the position it attends to most, as `ids`, and its probability, as `values`."""
    return _readout(options, "attn_z", pb.Readout(heads=pb.HeadReadout(heads=list(heads))))


def _readout(options: ReadoutOptions, site: SiteName, readout: pb.Readout) -> pb.Readout:
    layers, all_layers = layer_fields(options.get("layers", ()))
    readout.MergeFrom(
        pb.Readout(
            name=options.get("name", ""),
            site=value_of(SITES, site, "site"),
            layers=layers,
            all_layers=all_layers,
            scope=scope_message(options.get("scope")),
        )
    )
    return readout
