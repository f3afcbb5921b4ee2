"""Subspaces and affine maps in the store: what comes back, and what is refused by name."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.sites import Site

SUBSPACE, AFFINE_MAP = ArtifactKind.SUBSPACE, ArtifactKind.AFFINE_MAP
F = torch.ones


def orthonormal(rank: int, width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64))[0].T.float()


def put(store: ArtifactStore, kind: ArtifactKind, tensors: dict[str, Tensor]) -> ArtifactInfo:
    return store.put(kind, tensors, model_fingerprint="m", site=Site.RESID_POST)


def test_a_subspace_comes_back_with_what_each_layer_has(tmp_path: Path) -> None:
    tensors = {
        "layer.2.rotation": orthonormal(3, 8),
        "layer.2.weight": torch.randn(3, 8),
        "layer.2.bias": torch.randn(3),
        "layer.10.rotation": orthonormal(2, 8),
        "layer.10.centre": torch.randn(8),
    }
    info = put(ArtifactStore(tmp_path), SUBSPACE, tensors)
    artifact = ArtifactStore(tmp_path).get(info.id)
    assert (info.layers, info.width, info.site) == ((2, 10), 8, Site.RESID_POST)
    of_intervention, plane = artifact.subspace(2), artifact.subspace(10)
    assert torch.equal(of_intervention.rotation, tensors["layer.2.rotation"])
    assert of_intervention.weight is not None
    assert torch.equal(of_intervention.weight, tensors["layer.2.weight"])
    assert of_intervention.bias is not None
    assert torch.equal(of_intervention.bias, tensors["layer.2.bias"])
    assert of_intervention.centre is None
    assert plane.centre is not None
    assert torch.equal(plane.centre, tensors["layer.10.centre"])
    assert (plane.weight, plane.bias) == (None, None)


def test_an_affine_map_comes_back_whole_or_in_two_factors(tmp_path: Path) -> None:
    tensors = {
        "layer.0.matrix": torch.randn(6, 6),
        "layer.0.bias": torch.randn(6),
        "layer.1.left": torch.randn(6, 2),
        "layer.1.right": torch.randn(6, 2),
    }
    store = ArtifactStore(tmp_path)
    info = put(store, AFFINE_MAP, tensors)
    artifact = store.get(info.id)
    assert (info.layers, info.width, info.site) == ((0, 1), 6, Site.RESID_POST)
    full, factors = artifact.affine_map(0), artifact.affine_map(1)
    assert full.matrix is not None
    assert torch.equal(full.matrix, tensors["layer.0.matrix"])
    assert full.bias is not None
    assert factors.left is not None
    assert factors.right is not None
    assert torch.equal(factors.right, tensors["layer.1.right"])
    assert (full.left, factors.matrix, factors.bias) == (None, None, None)


def test_layers_of_maps_can_be_taken_without_the_others(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = put(store, SUBSPACE, {f"layer.{layer}.rotation": orthonormal(1, 4) for layer in (0, 1, 11)})
    part = store.get(info.id).only([1])
    assert (part.info.layers, list(part.tensors)) == ((1,), ["layer.1.rotation"])
    with pytest.raises(NotFound, match="no layer 2"):
        part.subspace(2)


def test_a_map_is_not_read_as_another_kind(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    subspace = store.get(put(store, SUBSPACE, {"layer.0.rotation": orthonormal(1, 4)}).id)
    affine = store.get(put(store, AFFINE_MAP, {"layer.0.matrix": torch.eye(4)}).id)
    for read in (subspace.affine_map, subspace.direction, affine.subspace):
        with pytest.raises(FailedPrecondition):
            read(0)


def test_a_rotation_kept_in_sixteen_bits_passes_for_orthonormal(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = put(store, SUBSPACE, {"layer.0.rotation": orthonormal(8, 512).bfloat16()})
    assert store.get(info.id).subspace(0).rotation.dtype == torch.bfloat16


R = torch.eye(4)[:2]
BAD = {
    "a name of another kind": (SUBSPACE, {"layer.0": F(4)}, "accepted: layer.<l>.rotation"),
    "a layer with a leading zero": (SUBSPACE, {"layer.01.rotation": R}, "accepted: layer.<l>.rotation"),
    "nothing": (SUBSPACE, {}, "at least one layer"),
    "rows that are not orthonormal": (SUBSPACE, {"layer.0.rotation": R * 1.1}, "layer.0.rotation are not orthonormal"),
    "a vector for a rotation": (SUBSPACE, {"layer.0.rotation": F(4)}, "2 dimension(s)"),
    "more rows than channels": (SUBSPACE, {"layer.0.rotation": F(5, 4)}, "at most 4"),
    "a centre alone": (SUBSPACE, {"layer.0.centre": F(4)}, "without layer.0.rotation"),
    "a weight without a bias": (SUBSPACE, {"layer.0.rotation": R, "layer.0.weight": R}, "without layer.0.bias"),
    "a bias of another rank": (
        SUBSPACE,
        {"layer.0.rotation": R, "layer.0.weight": R, "layer.0.bias": F(3)},
        "layer.0.bias has the shape [3], not [2]",
    ),
    "a centre of three dimensions": (
        SUBSPACE,
        {"layer.0.rotation": torch.eye(4)[:3], "layer.0.centre": F(4)},
        "of rank 2, not 3",
    ),
    "two widths": (SUBSPACE, {"layer.0.rotation": R, "layer.1.rotation": torch.eye(5)[:2]}, "not [2, 4]"),
    "NaN": (SUBSPACE, {"layer.0.rotation": R, "layer.0.centre": F(4) * math.nan}, "layer.0.centre holds NaN or Inf"),
    "whole numbers": (SUBSPACE, {"layer.0.rotation": R.long()}, "layer.0.rotation must be floats"),
    "no map": (AFFINE_MAP, {"layer.0.bias": F(4)}, "either matrix, or left and right"),
    "both forms": (AFFINE_MAP, {"layer.0.matrix": F(4, 4), "layer.0.left": F(4, 2)}, "either matrix"),
    "one factor": (AFFINE_MAP, {"layer.0.left": F(4, 2)}, "without layer.0.right"),
    "factors of two ranks": (AFFINE_MAP, {"layer.0.left": F(4, 2), "layer.0.right": F(4, 3)}, "not [4, 2]"),
    "a matrix that is not square": (AFFINE_MAP, {"layer.0.matrix": F(4, 5)}, "not [4, 4]"),
    "maps of two widths": (AFFINE_MAP, {"layer.0.matrix": F(4, 4), "layer.1.matrix": F(5, 5)}, "not [4, 4]"),
    "infinity": (AFFINE_MAP, {"layer.0.matrix": F(4, 4) * math.inf}, "layer.0.matrix holds NaN or Inf"),
}


@pytest.mark.parametrize(("kind", "tensors", "message"), BAD.values(), ids=BAD.keys())
def test_bad_maps_are_refused_by_name_and_nothing_is_stored(
    tmp_path: Path, kind: ArtifactKind, tensors: dict[str, Tensor], message: str
) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(InvalidArgument) as refusal:
        put(store, kind, tensors)
    assert refusal.value.field == "tensors"
    assert message in refusal.value.message
    assert store.list() == ([], "")


def test_a_map_needs_its_site(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ArtifactStore(tmp_path).put(SUBSPACE, {"layer.0.rotation": orthonormal(1, 4)}, model_fingerprint="m")
    assert refusal.value.field == "site"
