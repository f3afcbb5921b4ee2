"""What changes: one function for each kind of edit.

Each kind defines a target t(h); the edit writes h + strength·(t(h) - h).
Options that every edit takes are in EditOptions, those of edits by a vector in VectorEditOptions.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict, Unpack, assert_never

from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.scopes import Scope, scope_message
from patchclamp.programs.vectors import VectorLike, vector
from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import program_pb2 as pb

Layers = int | Iterable[int] | Literal["all"]
Neurons = int | Iterable[int] | str


class EditOptions(TypedDict, total=False):
    """layers: one layer, several, or "all"; left out only for a neuron set, which names its own.

    strength: 1 (default) is the full edit, 0 changes nothing. scope: default every token. gate: default always.
    name: unique in the program; needed to change the strength in a session and shown in the receipt.
    """

    layers: Layers
    strength: float
    scope: Scope
    gate: pb.Gate
    name: str


class VectorEditOptions(EditOptions, total=False):
    """site: default "resid_post". preserve_norm: rescale the result to the norm that h had."""

    site: SiteName
    preserve_norm: bool


def add(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h + v."""
    return _by_vector(options, pb.Edit(add=pb.AddVector(vector=vector(direction))))


def project_out(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h - (h·u)u, with u = v/‖v‖."""
    return _by_vector(options, pb.Edit(project_out=pb.ProjectOut(vector=vector(direction))))


def cap_projection(
    direction: VectorLike,
    *,
    min: float | None = None,
    max: float | None = None,
    **options: Unpack[VectorEditOptions],
) -> pb.Edit:
    """t(h) = h + (clip(h·u, min, max) - h·u)u. At least one bound."""
    _check_bounds(min, max)
    return _by_vector(options, pb.Edit(cap_projection=pb.CapProjection(vector=vector(direction), min=min, max=max)))


def set_projection(direction: VectorLike, target: float, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = h + (target - h·u)u."""
    return _by_vector(options, pb.Edit(set_projection=pb.SetProjection(vector=vector(direction), target=target)))


def replace(direction: VectorLike, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """t(h) = v."""
    return _by_vector(options, pb.Edit(replace=pb.ReplaceVector(vector=vector(direction))))


def rotate_towards(direction: VectorLike, radians: float, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """Turns h by `radians` (0 to π) towards v in the plane of both, never past v; the norm stays."""
    return _by_vector(options, pb.Edit(rotate_towards=pb.RotateTowards(vector=vector(direction), radians=radians)))


def low_rank(rotation: Numbers, weight: Numbers, bias: Numbers, **options: Unpack[VectorEditOptions]) -> pb.Edit:
    """ReFT: t(h) = h + Rᵀ(Wh + b - Rh), with R and W [rank, width] and b [rank]."""
    kind = pb.LowRank(rotation=tensor(rotation), weight=tensor(weight), bias=tensor(bias))
    return _by_vector(options, pb.Edit(low_rank=kind))


def set_neurons(neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[EditOptions]) -> pb.Edit:
    """t(a) = value.

    neurons: one index, several, or the id or tag of a neuron set.
    values: one for all neurons or one each; left out: those that the neuron set carries.
    """
    return _neurons(options, pb.NeuronEdit(set=_values(neurons, values)), neurons)


def scale_neurons(neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[EditOptions]) -> pb.Edit:
    """t(a) = value·a. Arguments as in set_neurons."""
    return _neurons(options, pb.NeuronEdit(scale=_values(neurons, values)), neurons)


def add_neurons(neurons: Neurons, values: float | Sequence[float] = (), **options: Unpack[EditOptions]) -> pb.Edit:
    """t(a) = a + value. Arguments as in set_neurons."""
    return _neurons(options, pb.NeuronEdit(add=_values(neurons, values)), neurons)


def clamp_neurons(
    neurons: Neurons, *, min: float | None = None, max: float | None = None, **options: Unpack[EditOptions]
) -> pb.Edit:
    """t(a) = clip(a, min, max). At least one bound."""
    _check_bounds(min, max)
    return _neurons(options, pb.NeuronEdit(clamp=pb.NeuronBounds(min=min, max=max)), neurons)


def scale_heads(heads: int | Iterable[int], factor: float, **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = factor·z for the output of each head."""
    return _edit(options, "attn_z", pb.Edit(heads=pb.HeadEdit(heads=_indices(heads), scale=factor)))


def ablate_heads(heads: int | Iterable[int], **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = 0."""
    return scale_heads(heads, 0.0, **options)


def mean_heads(heads: int | Iterable[int], mean: Numbers, **options: Unpack[EditOptions]) -> pb.Edit:
    """t(z) = mean: [n_heads_of_edit, head_dim], or [n_layers_of_edit, n_heads_of_edit, head_dim]."""
    return _edit(options, "attn_z", pb.Edit(heads=pb.HeadEdit(heads=_indices(heads), mean=tensor(mean))))


def uniform_heads(heads: int | Iterable[int], **options: Unpack[EditOptions]) -> pb.Edit:
    """The heads attend to all visible tokens alike.

    Strength s multiplies the query, after its norm and rotation, by 1 - s: at 0.5 attention is flatter, and no average
    of its pattern with the uniform one.
    """
    return _edit(options, "attn_z", pb.Edit(heads=pb.HeadEdit(heads=_indices(heads), uniform=True)))


def layer_fields(layers: Layers) -> tuple[list[int], bool]:
    """(layers, all_layers) of the message. Which layers exist is the server's to say."""
    match layers:
        case "all":
            return [], True
        case str():
            raise ValueError(f'layers is {layers!r}; accepted: an int, several ints, or "all"')
        case int():
            return [layers], False
        case Iterable():
            return list(layers), False
        case _:
            assert_never(layers)


def _by_vector(options: VectorEditOptions, edit: pb.Edit) -> pb.Edit:
    edit.preserve_norm = options.get("preserve_norm", False)
    return _edit(options, options.get("site", "resid_post"), edit)


def _neurons(options: EditOptions, kind: pb.NeuronEdit, neurons: Neurons) -> pb.Edit:
    if isinstance(neurons, str):
        kind.neuron_set = neurons
    else:
        kind.neurons.extend(_indices(neurons))
    return _edit(options, "mlp_post", pb.Edit(neurons=kind))


def _edit(options: EditOptions, site: SiteName, edit: pb.Edit) -> pb.Edit:
    """Fills in what every edit has."""
    layers, all_layers = layer_fields(options.get("layers", ()))
    edit.MergeFrom(
        pb.Edit(
            name=options.get("name", ""),
            site=value_of(SITES, site, "site"),
            layers=layers,
            all_layers=all_layers,
            strength=options.get("strength"),
            scope=scope_message(options.get("scope")),
            gate=options.get("gate"),
        )
    )
    return edit


def _indices(indices: int | Iterable[int]) -> list[int]:
    return [indices] if isinstance(indices, int) else list(indices)


def _values(neurons: Neurons, values: float | Sequence[float]) -> pb.NeuronValues:
    listed = [values] if isinstance(values, int | float) else list(values)
    if not listed and not isinstance(neurons, str):
        raise ValueError("values can be left out only with a neuron set that carries them")
    return pb.NeuronValues(values=listed)


def _check_bounds(low: float | None, high: float | None) -> None:
    if low is None and high is None:
        raise ValueError("give min, max or both")
    if low is not None and high is not None and low > high:
        raise ValueError(f"min {low} is above max {high}")
