"""What is read while the model runs, and streamed with the tokens it belongs to. Seen after all edits of the site."""

from collections.abc import Iterable
from typing import TypedDict, Unpack

from patchclamp.fields import build, one_or_several, several
from patchclamp.keywords import takes_options_of
from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.edits import Layers, layer_fields
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.v1 import program_pb2 as pb


class ReadoutOptions(TypedDict, total=False):
    """Options of every readout.

    layers: one layer, several, or "all". name: what the values are shown with.
    scope: a scope or "prompt" or "generated"; by default every token.
    """

    layers: Layers
    scope: ScopeLike | None
    name: str


def _readout(
    readout: pb.Readout,
    fixed_site: SiteName,
    *,
    layers: Layers = (),
    scope: ScopeLike | None = None,
    name: str = "",
) -> pb.Readout:
    listed, all_layers = layer_fields(layers)
    common = build(
        pb.Readout,
        name=name,
        site=value_of(SITES, fixed_site, "site"),
        layers=listed,
        all_layers=all_layers,
        scope=scope_message(scope),
    )
    readout.MergeFrom(common)
    return readout


@takes_options_of(_readout)
def read_projection(
    directions: Iterable[VectorLike], *, site: SiteName = "resid_post", **options: Unpack[ReadoutOptions]
) -> pb.Readout:
    """Reads h·v/|v| for each vector, on the scale of when(), abort_when() and watched directions.

    Times |v|, the `norm` in the evidence of an extracted vector, it is h·v.
    """
    listed = several(directions, "directions", "a vector")
    kind = pb.ProjectionReadout(vectors=[vector_of(d, f"directions[{i}]") for i, d in enumerate(listed)])
    return _readout(pb.Readout(projection=kind), site, **options)


@takes_options_of(_readout)
def read_neurons(
    neurons: Iterable[int], *, site: SiteName = "mlp_post", **options: Unpack[ReadoutOptions]
) -> pb.Readout:
    """Reads the values of chosen neurons, or at "mlp_gate" and "mlp_up" those that they are made of."""
    return _readout(pb.Readout(neurons=build(pb.NeuronReadout, neurons=neurons)), site, **options)


@takes_options_of(_readout)
def read_top_neurons(k: int, *, site: SiteName = "mlp_post", **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """Reads the k neurons with the largest absolute value, at "mlp_gate" or "mlp_up" of what they are made of."""
    return _readout(pb.Readout(top_neurons=build(pb.TopNeuronsReadout, k=k)), site, **options)


@takes_options_of(_readout)
def read_logit_lens(
    k: int = 0,
    *,
    token_ids: int | Iterable[int] = (),
    neurons: int | Iterable[int] = (),
    site: SiteName | None = None,
    **options: Unpack[ReadoutOptions],
) -> pb.Readout:
    """Reads the k most likely tokens, or the log-probabilities of `token_ids`, when this residual state goes through
    the final norm and unembedding.

    At "attn_out" and "mlp_out", and of each of `neurons` (at "mlp_post"), the values are contributions to the logits.
    """
    kind = build(
        pb.LogitLensReadout,
        k=k,
        token_ids=one_or_several(token_ids, "token_ids", "an int"),
        neurons=one_or_several(neurons, "neurons", "an int"),
    )
    return _readout(pb.Readout(logit_lens=kind), site or ("mlp_post" if kind.neurons else "resid_post"), **options)


def read_probe(probe: str, *, all_classes: bool = False, scope: ScopeLike | None = None, name: str = "") -> pb.Readout:
    """Reads the probability of a stored probe, of one of numbers its number, where the probe is: at its last layer.

    all_classes: that of each label, in their order. The values are of single tokens, also where the probe was trained
    on pooled states: a figure for a text is their mean.
    """
    kind = build(pb.ProbeReadout, probe=probe, all_classes=all_classes)
    return build(pb.Readout, probe=kind, scope=scope_message(scope), name=name)


@takes_options_of(_readout)
def read_features(
    autoencoder: str,
    features: int | Iterable[int],
    *,
    site: SiteName = "resid_post",
    **options: Unpack[ReadoutOptions],
) -> pb.Readout:
    """Reads chosen features of a sparse autoencoder of this site and layer: their activations, in the order given."""
    listed = one_or_several(features, "features", "an int")
    kind = build(pb.FeatureReadout, autoencoder=autoencoder, features=listed)
    return _readout(pb.Readout(features=kind), site, **options)


@takes_options_of(_readout)
def read_top_features(
    autoencoder: str, k: int, *, site: SiteName = "resid_post", **options: Unpack[ReadoutOptions]
) -> pb.Readout:
    """Reads the k largest features that are above 0, the largest first.

    The server holds the whole encoder for it, and multiplies each token by all of it.
    """
    kind = build(pb.FeatureReadout, autoencoder=autoencoder, k=k)
    return _readout(pb.Readout(features=kind), site, **options)


@takes_options_of(_readout)
def read_heads(heads: Iterable[int] = (), **options: Unpack[ReadoutOptions]) -> pb.Readout:
    """Reads which position each head (by default all) attends to most, as `ids`, and its probability, as `values`."""
    return _readout(pb.Readout(heads=build(pb.HeadReadout, heads=heads)), "attn_z", **options)


@takes_options_of(_readout)
def read_activation(
    *, site: SiteName = "resid_post", units: Iterable[int] = (), **options: Unpack[ReadoutOptions]
) -> pb.Readout:
    """Reads the activation itself, all of it or some units.

    Every token and layer brings as many numbers as the site is wide: name the tokens in scope. Of whole texts
    read_activations of a client is the better reader.
    """
    return _readout(pb.Readout(activations=build(pb.ActivationReadout, units=units)), site, **options)
