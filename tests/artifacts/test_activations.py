"""Stored activations: which tensors they have, and that rows of one text are read without the others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from patchclamp_server.artifacts.activation_rows import StoredActivations
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.tensor_file import TensorFile
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.sites import Site


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def tensors(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two rows of text 0, three of text 2."""
    found = {
        "text": ints(0, 0, 2, 2, 2),
        "position": ints(1, 3, 0, 1, 5),
        "token": ints(7, 8, 9, 7, 6),
        "length": ints(4, 4, 6, 6, 6),
        "resid_pre.1": torch.arange(15.0).view(5, 3),
        "mlp_post.0": torch.arange(20.0).view(5, 4).to(torch.bfloat16),
    }
    return found | {name.replace("__", "."): tensor for name, tensor in others.items()}


def put(store: ArtifactStore, **provenance: Any) -> ArtifactInfo:
    return store.put(ArtifactKind.ACTIVATIONS, tensors(), model_fingerprint="m", provenance=provenance)


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path) if request.param == "directory" else f"memory://{tmp_path.name}-activations")


def test_the_rows_of_a_text_come_back_with_their_positions_and_tokens(store: ArtifactStore) -> None:
    stored = StoredActivations(*store.open(put(store).id))
    assert stored.info.layers == (0, 1)
    assert stored.widths == {(Site.RESID_PRE, 1): 3, (Site.MLP_POST, 0): 4}
    assert stored.texts() == [0, 2]
    rows = stored.rows_of(2)
    assert (rows.positions.tolist(), rows.tokens.tolist(), rows.length) == ([0, 1, 5], [9, 7, 6], 6)
    assert torch.equal(stored.values(Site.RESID_PRE, 1, rows), torch.arange(15.0).view(5, 3)[2:])
    assert stored.values(Site.MLP_POST, 0, stored.rows_of(0)).dtype == torch.bfloat16


def test_of_one_text_site_and_layer_only_its_own_bytes_are_read(store: ArtifactStore) -> None:
    info, file = store.open(put(store).id)
    read: list[int] = []

    def counted(start: int, end: int) -> bytes:
        read.append(end - start)
        return file.read(start, end)

    stored = StoredActivations(info, TensorFile(file.header, counted))
    rows = stored.rows_of(0)
    read.clear()
    stored.values(Site.RESID_PRE, 1, rows)
    assert read == [2 * 3 * 4]


def test_a_text_site_or_layer_without_rows_is_not_found(store: ArtifactStore) -> None:
    stored = StoredActivations(*store.open(put(store).id))
    with pytest.raises(NotFound, match="no row of text 1; it has rows of 0, 2"):
        stored.rows_of(1)
    with pytest.raises(NotFound, match=r"no rows of resid_pre\.0; it has mlp_post\.0, resid_pre\.1"):
        stored.values(Site.RESID_PRE, 0, stored.rows_of(0))


def test_another_kind_of_artifact_holds_no_rows(store: ArtifactStore) -> None:
    info = store.put(ArtifactKind.VECTOR, {"layer.0": torch.ones(3)}, model_fingerprint="m", site=Site.RESID_PRE)
    with pytest.raises(FailedPrecondition, match="is a vector, not activations"):
        StoredActivations(*store.open(info.id))


def test_damaged_bytes_are_found_before_a_slice_is_read(tmp_path: Path) -> None:
    digest = put(ArtifactStore(tmp_path)).id.removeprefix("sha256:")
    path = tmp_path / "objects" / digest[:2] / f"{digest[2:]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FailedPrecondition, match="damaged"):
        ArtifactStore(tmp_path).open(f"sha256:{digest}")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text": ints(2, 2, 0, 0, 0)}, "text falls at row 2"),
        ({"position": ints(1, 1, 0, 1, 5)}, "position does not rise within its text at row 1"),
        ({"length": ints(4, 4, 6, 6, 5)}, "length differs within a text at row 4"),
        ({"length": ints(3, 3, 6, 6, 6)}, "position is not below length at row 1"),
        ({"token": ints(-1, 8, 9, 7, 6)}, "token is below 0 at row 0"),
        ({"token": torch.ones(5)}, "token must be int64, not float32"),
        ({"label": ints(0, 0, 0, 0)}, r"label has the shape \[4\], text has \[5\]"),
        ({"resid_pre__1": torch.ones(4, 3)}, r"resid_pre\.1 must be \[5, width\]"),
        ({"resid_pre__1": torch.ones(5, 3).double()}, "must be float32, float16 or bfloat16, not float64"),
        ({"resid_pre__1": torch.full((5, 3), torch.nan)}, "NaN or Inf"),
        ({"resid_pre__2": torch.ones(5, 4)}, "has the width 4, another layer of resid_pre has 3"),
        ({"attn_q__1": torch.ones(5, 3)}, "'attn_q.1' is not a tensor of activations"),
    ],
)
def test_tensors_that_activations_do_not_have_are_refused(
    store: ArtifactStore, wrong: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        store.put(ArtifactKind.ACTIVATIONS, tensors(**wrong), model_fingerprint="m")


def test_a_label_needs_a_name(store: ArtifactStore) -> None:
    labelled = tensors(label=ints(0, 0, 1, 1, 1))
    with pytest.raises(InvalidArgument, match="label holds 1; 1 have a name"):
        store.put(ArtifactKind.ACTIVATIONS, labelled, model_fingerprint="m", provenance={"labels": ["a"]})
    info = store.put(ArtifactKind.ACTIVATIONS, labelled, model_fingerprint="m", provenance={"labels": ["a", "b"]})
    assert StoredActivations(*store.open(info.id)).labels == ("a", "b")
