"""What changes: one function for each kind of edit.

Each kind defines a target t(h); the edit writes h + strength·(t(h) - h).
Options that every edit takes are in EditOptions, those of edits by a vector in VectorEditOptions, those of edits of
neurons in NeuronEditOptions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict, Unpack

from patchclamp.fields import build, build_as, one_or_several
from patchclamp.keywords import takes_options_of
from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import program_pb2 as pb

Layers = int | Iterable[int] | Literal["all"]
Neurons = int | Iterable[int] | str


class EditOptions(TypedDict, total=False):
    """Options of every edit.

    layers: one layer, several, or "all"; left out only for a neuron set, which names its own.

    strength: 1 (default) is the full edit, 0 changes nothing. gate: by default the edit is always made.
    scope: a scope or "prompt" or "generated"; by default every token.
    name: unique in the program; needed to change the strength in a session and shown in the receipt.
    """

    layers: Layers
    strength: float | None
    scope: ScopeLike | None
    gate: pb.Gate | None
    name: str


class VectorEditOptions(EditOptions, total=False):
    """Options of edits by a vector, or of features, besides EditOptions.

    site: by default "resid_post". preserve_norm: whether the result is rescaled to the norm that h had.
    """

    site: SiteName
    preserve_norm: bool


class NeuronEditOptions(EditOptions, total=False):
    """Options of edits of neurons, besides EditOptions.

    site: by default "mlp_post"; "mlp_gate" and "mlp_up" are what a neuron is made of, act(gate)·up, of which models
    without a gate have "mlp_up".
    """

    site: SiteName


def _edit(
    edit: pb.Edit,
    fixed_site: SiteName,
    *,
    layers: Layers = (),
    strength: float | None = None,
    scope: ScopeLike | None = None,
    gate: pb.Gate | None = None,
    name: str = "",
) -> pb.Edit:
    """Fills in what every edit has."""
    listed, all_layers = layer_fields(layers)
    common = build(
        pb.Edit,
        name=name,
        site=value_of(SITES, fixed_site, "site"),
        layers=listed,
        all_layers=all_layers,
        strength=strength,
        scope=scope_message(scope),
        gate=gate,
    )
    edit.MergeFrom(common)
    return edit


@takes_options_of(_edit)
def _by_vector(
    edit: pb.Edit, *, site: SiteName = "resid_post", preserve_norm: bool = False, **options: Unpack[EditOptions]
) -> pb.Edit:
    edit.MergeFrom(build(pb.Edit, preserve_norm=preserve_norm))
    return _edit(edit, site, **options)


@takes_options_of(_edit)
def _neurons(
    kind: pb.NeuronEdit, neurons: Neurons, *, site: SiteName = "mlp_post", **options: Unpack[EditOptions]
) -> pb.Edit:
    if isinstance(neurons, str):
        kind.neuron_set = neurons
    else:
        kind.MergeFrom(build(pb.NeuronEdit, neurons=one_or_several(neurons, "neurons", "an int")))
    return _edit(pb.Edit(neurons=kind), site, **options)


@takes_options_of(_by_vector)
def _features(
    kind: pb.FeatureEdit, autoencoder: str, features: int | Iterable[int], **options: Unpack[VectorEditOptions]
) -> pb.Edit:
    listed = one_or_several(features, "features", "an int")
    kind.MergeFrom(build(pb.FeatureEdit, autoencoder=autoencoder, features=listed))
    return _by_vector(pb.Edit(features=kind), **options)


@takes_options_of(_edit)
def _heads(kind: pb.HeadEdit, heads: int | Iterable[int], **options: Unpack[EditOptions]) -> pb.Edit:
    kind.MergeFrom(build(pb.HeadEdit, heads=one_or_several(heads, "heads", "an int")))
    return _edit(pb.Edit(heads=kind), "attn_z", **options)


@takes_options_of(_by_vector)
def add(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h + v: adds a vector."""
    return _by_vector(pb.Edit(add=pb.AddVector(vector=vector_of(direction, "direction"))), **options)


@takes_options_of(_by_vector)
def project_out(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h - (h·u)u, with u = v/‖v‖: takes a direction out."""
    return _by_vector(pb.Edit(project_out=pb.ProjectOut(vector=vector_of(direction, "direction"))), **options)


@takes_options_of(_by_vector)
def cap_projection(
    direction: VectorLike,
    *,
    min: float | None = None,
    max: float | None = None,
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + (clip(h·u, min, max) - h·u)u: keeps the projection within bounds, of which one at least is given."""
    kind = build(pb.CapProjection, vector=vector_of(direction, "direction"), min=min, max=max)
    _check_bounds(min, max)
    return _by_vector(pb.Edit(cap_projection=kind), **options)


@takes_options_of(_by_vector)
def set_projection(direction: VectorLike, target: float, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h + (target - h·u)u: sets the projection."""
    kind = build(pb.SetProjection, vector=vector_of(direction, "direction"), target=target)
    return _by_vector(pb.Edit(set_projection=kind), **options)


@takes_options_of(_by_vector)
def replace(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = v: replaces the state by a vector."""
    return _by_vector(pb.Edit(replace=pb.ReplaceVector(vector=vector_of(direction, "direction"))), **options)


@takes_options_of(_by_vector)
def rotate_towards(direction: VectorLike, radians: float, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """Turns h by `radians` (0 to π) towards v in the plane of both, never past v; the norm stays."""
    kind = build(pb.RotateTowards, vector=vector_of(direction, "direction"), radians=radians)
    return _by_vector(pb.Edit(rotate_towards=kind), **options)


@takes_options_of(_by_vector)
def rotate_in_plane(
    plane: "Numbers | str", radians: float, *, centre: "Numbers | None" = None, **options: Unpack[VectorEditOptions]
) -> pb.Edit:
    """t(h) = h + Pᵀ(T - I)P(h - c): turns the part of h in a plane by `radians` (-2π to 2π) about a centre.

    plane: P [2, width], which is made orthonormal, or the id or tag of a subspace of rank 2 with one for each layer. T
    turns from the first axis to the second. centre: c [width]; by default that of the artifact, else 0.
    """
    source = {"subspace": plane} if isinstance(plane, str) else {"plane": tensor(plane, "plane")}
    middle = None if centre is None else tensor(centre, "centre")
    kind = build(pb.RotateInPlane, **source, centre=middle, radians=radians)
    return _by_vector(pb.Edit(rotate_in_plane=kind), **options)


@takes_options_of(_by_vector)
def low_rank(
    rotation: "Numbers | str",
    weight: "Numbers | None" = None,
    bias: "Numbers | None" = None,
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + Rᵀ(Wh + b - Rh), with R and W [rank, width] and b [rank]: edits as ReFT does.

    rotation: R, or instead of all three the id or tag of a subspace that has them for each layer of the edit.
    """
    if isinstance(rotation, str):
        if weight is not None or bias is not None:
            raise ValueError("a subspace has its weight and bias; leave them out")
        return _by_vector(pb.Edit(low_rank=pb.LowRank(subspace=rotation)), **options)
    if weight is None or bias is None:
        raise ValueError("low_rank takes rotation, weight and bias, or a subspace")
    kind = pb.LowRank(rotation=tensor(rotation, "rotation"), weight=tensor(weight, "weight"), bias=tensor(bias, "bias"))
    return _by_vector(pb.Edit(low_rank=kind), **options)


@takes_options_of(_by_vector)
def affine(
    matrix: "Numbers | str | None" = None,
    *,
    left: "Numbers | None" = None,
    right: "Numbers | None" = None,
    bias: "Numbers | None" = None,
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = Ah + b, with A [width, width] = matrix, or left·rightᵀ of [width, rank] each; without a bias b is 0.

    matrix: A, or instead of all the id or tag of an affine_map that has A and b for each layer of the edit.

    Raises ValueError unless either matrix, or left and right, are given.
    """
    if isinstance(matrix, str):
        if any(other is not None for other in (left, right, bias)):
            raise ValueError("an affine_map has its own numbers; leave left, right and bias out")
        return _by_vector(pb.Edit(affine=pb.Affine(affine_map=matrix)), **options)
    given = {"matrix": matrix, "left": left, "right": right, "bias": bias}
    kind = pb.Affine()
    for name, values in given.items():
        if values is not None:
            getattr(kind, name).CopyFrom(tensor(values, name))
    if (matrix is None) == (left is None) or (left is None) != (right is None):
        raise ValueError("affine takes either matrix, or left and right")
    return _by_vector(pb.Edit(affine=kind), **options)


@takes_options_of(_by_vector)
def patch(
    activations: str,
    *,
    text: int = 0,
    positions: Mapping[int, int] | Iterable[int] = (),
    source_layer: int | None = None,
    units: int | Iterable[int] = (),
    heads: int | Iterable[int] = (),
    subspace: str = "",
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = s, or h + R^T R (s - h) with a subspace: puts rows of another run in the place of those of this one
    (activation patching).

    activations: id or tag of an activations artifact with rows at the site. text: the one of its texts whose rows are
    taken. positions: {position: position in the text}, or several that stay where they are; negative ones count from
    the end of the prompt, and of the text. By default all that the artifact has rows of, onto the same positions.
    source_layer: by default that of the edit. units, heads: only these of a row; heads are at "attn_z", the site then.
    subspace: only the part of a row in it, by the id or tag of an artifact.
    """
    listed = one_or_several(heads, "heads", "an int")
    if listed:
        options.setdefault("site", "attn_z")
    pairs = [*positions.items()] if isinstance(positions, Mapping) else [(each, each) for each in _several(positions)]
    kind = build(
        pb.Patch,
        activations=activations,
        text=text,
        source_layer=source_layer,
        positions=[_patch_position(position, source) for position, source in pairs],
        units=one_or_several(units, "units", "an int"),
        heads=listed,
        subspace=subspace,
    )
    return _by_vector(pb.Edit(patch=kind), **options)


@takes_options_of(_neurons)
def set_neurons(
    neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[NeuronEditOptions]
) -> pb.Edit:
    """t(a) = value: sets neurons.

    neurons: one index, several, or the id or tag of a neuron set.
    values: one for all neurons or one for each; when left out, those that the neuron set carries.
    """
    return _neurons(pb.NeuronEdit(set=_values(neurons, values)), neurons, **options)


@takes_options_of(_neurons)
def scale_neurons(
    neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[NeuronEditOptions]
) -> pb.Edit:
    """t(a) = value·a: scales neurons. set_neurons describes the arguments."""
    return _neurons(pb.NeuronEdit(scale=_values(neurons, values)), neurons, **options)


@takes_options_of(_neurons)
def add_neurons(
    neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[NeuronEditOptions]
) -> pb.Edit:
    """t(a) = a + value: adds to neurons. set_neurons describes the arguments."""
    return _neurons(pb.NeuronEdit(add=_values(neurons, values)), neurons, **options)


@takes_options_of(_neurons)
def clamp_neurons(
    neurons: Neurons, *, min: float | None = None, max: float | None = None, **options: Unpack[NeuronEditOptions]
) -> pb.Edit:
    """t(a) = clip(a, min, max): keeps neurons within bounds, of which one at least is given."""
    bounds = build(pb.NeuronBounds, min=min, max=max)
    _check_bounds(min, max)
    return _neurons(pb.NeuronEdit(clamp=bounds), neurons, **options)


@takes_options_of(_features)
def set_features(
    autoencoder: str,
    features: int | Iterable[int],
    values: float | Sequence[float],
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + Σᵢ(value - fᵢ)dᵢ: sets features of a sparse autoencoder, and leaves all else of h as it is.

    autoencoder: the id or tag of an autoencoder artifact. features: one number, or several.
    values: one for all features or one for each.
    """
    return _features(pb.FeatureEdit(set=_feature_values(values)), autoencoder, features, **options)


@takes_options_of(_features)
def scale_features(
    autoencoder: str,
    features: int | Iterable[int],
    values: float | Sequence[float],
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + Σᵢ(value·fᵢ - fᵢ)dᵢ: scales features; 0 takes them out. set_features describes the arguments."""
    return _features(pb.FeatureEdit(scale=_feature_values(values)), autoencoder, features, **options)


@takes_options_of(_features)
def add_features(
    autoencoder: str,
    features: int | Iterable[int],
    values: float | Sequence[float],
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + Σᵢ value·dᵢ: adds to features. set_features describes the arguments."""
    return _features(pb.FeatureEdit(add=_feature_values(values)), autoencoder, features, **options)


@takes_options_of(_features)
def clamp_features(
    autoencoder: str,
    features: int | Iterable[int],
    *,
    min: float | None = None,
    max: float | None = None,
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + Σᵢ(clip(fᵢ, min, max) - fᵢ)dᵢ: keeps features within bounds, of which one at least is given."""
    bounds = build(pb.NeuronBounds, min=min, max=max)
    _check_bounds(min, max)
    return _features(pb.FeatureEdit(clamp=bounds), autoencoder, features, **options)


@takes_options_of(_heads)
def scale_heads(heads: int | Iterable[int], factor: float, **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = factor·z: scales the output of each head."""
    return _heads(build_as({"scale": "factor"}, pb.HeadEdit, scale=factor), heads, **options)


@takes_options_of(_heads)
def ablate_heads(heads: int | Iterable[int], **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = 0: ablates heads."""
    return scale_heads(heads, 0.0, **options)


@takes_options_of(_heads)
def mean_heads(heads: int | Iterable[int], mean: Numbers, **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = mean: replaces the output of heads by a mean.

    mean: [n_heads_of_edit, head_dim], or [n_layers_of_edit, n_heads_of_edit, head_dim].
    """
    return _heads(pb.HeadEdit(mean=tensor(mean, "mean")), heads, **options)


@takes_options_of(_heads)
def uniform_heads(heads: int | Iterable[int], **options: Unpack[EditOptions]) -> pb.Edit:
    """Lets heads attend to all visible tokens alike.

    Strength s multiplies the query, after its norm and rotation, by 1 - s: at 0.5 attention is flatter, but it is
    no average of its pattern with the uniform one.
    """
    return _heads(pb.HeadEdit(uniform=True), heads, **options)


def _several(positions: object) -> list[int]:
    return one_or_several(positions, "positions", "an int, or {position: source}")


def _patch_position(position: int, source: int) -> pb.PatchPosition:
    field = f"positions[{position!r}]"
    return build_as({"position": "positions", "source": field}, pb.PatchPosition, position=position, source=source)


def layer_fields(layers: Layers) -> tuple[list[int], bool]:
    """Returns (layers, all_layers) of the message. Which layers exist is the server's to say."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers is {layers!r}; accepted: an int, several ints, or "all"')
        return [], True
    return one_or_several(layers, "layers", 'an int, or "all"'), False


def _values(neurons: Neurons, values: float | Sequence[float]) -> pb.NeuronValues:
    listed = one_or_several(values, "values", "a number")
    if not listed and not isinstance(neurons, str):
        raise ValueError("values can be left out only with a neuron set that carries them")
    return build(pb.NeuronValues, values=listed)


def _feature_values(values: float | Sequence[float]) -> pb.NeuronValues:
    return build(pb.NeuronValues, values=one_or_several(values, "values", "a number"))


def _check_bounds(low: float | None, high: float | None) -> None:
    if low is None and high is None:
        raise ValueError("give min, max or both")
    if low is not None and high is not None and low > high:
        raise ValueError(f"min {low} is above max {high}")
