"""Autoencoders: what is stored, what each activation function computes, and that features are read without the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import put_autoencoder
from engine_runs import loaded
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.artifacts import tensor_file
from patchclamp_server.artifacts.autoencoder_spec import Function, autoencoder_spec
from patchclamp_server.artifacts.autoencoders import Autoencoder, open_autoencoder
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.sites import Site

F, W, T = 96, 12, 7


def tensors(*, threshold: bool = False, output_width: int = W, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {
        "encoder": torch.randn(F, W),
        "encoder_bias": torch.randn(F),
        "decoder": torch.randn(F, output_width),
        "decoder_bias": torch.randn(output_width),
    }
    if threshold:
        # A few are negative, which is none: no feature is active below 0.
        found["threshold"] = torch.randn(F) + 2.0
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def provenance(function: str = "relu", subtracted: str = "decoder_bias", **others: object) -> dict[str, Any]:
    return {"layer": 3, "function": function, "subtracted": subtracted} | others


def put(store: ArtifactStore, stored: dict[str, Tensor], said: dict[str, Any]) -> ArtifactInfo:
    return store.put(ArtifactKind.AUTOENCODER, stored, model_fingerprint="m", site=Site.RESID_POST, provenance=said)


def opened(store: ArtifactStore, stored: dict[str, Tensor], said: dict[str, Any]) -> Autoencoder:
    info, file = store.open(put(store, stored, said).id)
    return Autoencoder(autoencoder_spec(info.site, info.provenance), file)


def expected(h: Tensor, stored: dict[str, Tensor], said: dict[str, Any]) -> NDArray[np.float64]:
    """The formulas, in numpy and float64, a token at a time."""
    encoder, bias, decoder_bias = (stored[n].double().numpy() for n in ("encoder", "encoder_bias", "decoder_bias"))
    found = []
    for row in h.double().numpy():
        p = encoder @ (row - decoder_bias if said["subtracted"] == "decoder_bias" else row) + bias
        match said["function"]:
            case "relu":
                active = p > 0
            case "topk":
                active = np.isin(np.arange(F), np.argsort(-p)[: said["k"]])
            case _:
                active = p > stored["threshold"].double().numpy()
        found.append(np.where(active & (p > 0), p, 0.0))
    return np.array(found)


FUNCTIONS = [
    provenance(),
    provenance(subtracted="nothing"),
    provenance("jumprelu"),
    provenance("batchtopk", "nothing"),
    provenance("topk", k=5),
    # More than are above 0.
    provenance("topk", k=90),
]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture(params=[None, 5 * W * 4], ids=["one_block", "many_blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(tensor_file, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("said", FUNCTIONS, ids=lambda said: "-".join(map(str, said.values())))
def test_encode_equals_numpy_for_all_features_and_for_chosen_ones(store: ArtifactStore, said: dict[str, Any]) -> None:
    stored = tensors(threshold=said["function"] in ("jumprelu", "batchtopk"))
    autoencoder = opened(store, stored, said)
    h = 3.0 * torch.randn(T, W)
    want = expected(h, stored, said)
    assert 0 < (want > 0).sum() < want.size
    np.testing.assert_allclose(autoencoder.encode(h).numpy(), want, rtol=1e-4, atol=1e-4)
    chosen = [17, 95, 0, 3, 17]
    np.testing.assert_allclose(autoencoder.encode(h, chosen).numpy(), want[:, chosen], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("blocks")
def test_the_reconstruction_is_the_sum_of_decoder_rows_and_the_bias(store: ArtifactStore) -> None:
    stored = tensors()
    autoencoder = opened(store, stored, provenance())
    f = autoencoder.encode(torch.randn(T, W))
    want = f.numpy() @ stored["decoder"].numpy() + stored["decoder_bias"].numpy()
    np.testing.assert_allclose(autoencoder.decode(f).numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_stay_so_in_the_store_and_are_computed_with_in_float32(
    store: ArtifactStore, dtype: torch.dtype
) -> None:
    stored = tensors(dtype=dtype)
    autoencoder = opened(store, stored, provenance())
    assert autoencoder.file.dtypes["encoder"] is dtype
    h = torch.randn(T, W)
    np.testing.assert_allclose(autoencoder.encode(h).numpy(), expected(h, stored, provenance()), rtol=1e-4, atol=1e-4)


def test_rows_of_chosen_features_come_in_their_order_with_the_bias_that_holds_what_is_subtracted(
    store: ArtifactStore,
) -> None:
    stored = tensors(threshold=True)
    rows = opened(store, stored, provenance("jumprelu")).rows([40, 2, 41])
    for name in ("encoder", "decoder"):
        assert torch.equal(getattr(rows, name), stored[name][[40, 2, 41]])
    assert torch.equal(rows.bias, stored["encoder_bias"][[40, 2, 41]])
    assert torch.equal(rows.threshold, stored["threshold"][[40, 2, 41]].clamp(min=0))
    h = torch.randn(T, W)
    folded = h @ rows.encoder.T + rows.folded_bias
    torch.testing.assert_close(folded, rows.preactivations(h), rtol=1e-4, atol=1e-4)


def test_a_feature_is_read_without_the_matrices(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = opened(store, tensors(), provenance())
    monkeypatch.setattr(tensor_file, "_GAP_BYTES", 0)
    read: list[int] = []
    whole = autoencoder.file._read

    def counted(start: int, end: int) -> bytes:
        read.append(end - start)
        return whole(start, end)

    monkeypatch.setattr(autoencoder.file, "_read", counted)
    autoencoder.rows([90, 4])
    assert sum(read) == 2 * 2 * W * 4


def test_a_transcoder_reads_one_site_and_reconstructs_another(store: ArtifactStore) -> None:
    said = provenance(subtracted="nothing", output_site="mlp_out", output_layer=3)
    autoencoder = opened(store, tensors(output_width=20), said)
    assert autoencoder.spec.is_transcoder
    assert (autoencoder.spec.site, autoencoder.spec.output_site) == (Site.RESID_POST, Site.MLP_OUT)
    assert autoencoder.decode(autoencoder.encode(torch.randn(T, W))).shape == (T, 20)
    assert autoencoder.spec.provenance() == said


def test_the_store_says_where_an_autoencoder_reads(store: ArtifactStore) -> None:
    info = put(store, tensors(), provenance("topk", k=4))
    assert (info.kind, info.site, info.layers, info.width) == (ArtifactKind.AUTOENCODER, Site.RESID_POST, (3,), W)
    assert autoencoder_spec(info.site, info.provenance).function is Function.TOPK
    assert store.list(ArtifactKind.AUTOENCODER)[0] == [info]


def test_a_damaged_file_is_refused_when_it_is_opened(store: ArtifactStore, tmp_path: Path) -> None:
    info = put(store, tensors(), provenance())
    digest = info.id.removeprefix("sha256:")
    file = tmp_path / "objects" / digest[:2] / f"{digest[2:]}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FailedPrecondition, match="damaged"):
        ArtifactStore(tmp_path).open(info.id)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (provenance("gated"), "provenance.function"),
        ({"layer": 3, "function": "relu"}, "provenance.subtracted"),
        (provenance() | {"layer": 1.5}, "provenance.layer"),
        (provenance("topk"), "provenance.k"),
        (provenance("topk", k=F + 1), "provenance.k"),
        (provenance("jumprelu"), "tensors"),
        (provenance(output_site="mlp_out"), "provenance.output_layer"),
        (provenance(output_site="hook_z", output_layer=3), "provenance.output_site"),
    ],
)
def test_provenance_that_does_not_fit_the_tensors_is_refused_by_name(
    store: ArtifactStore, said: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        put(store, tensors(), said)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": None}, "needs decoder"),
        ({"gate": torch.zeros(F)}, "'gate' is not a tensor"),
        ({"encoder": torch.zeros(W)}, "encoder must be"),
        ({"decoder": torch.zeros(F + 1, W)}, "decoder must be"),
        ({"decoder": torch.zeros(F, W + 1), "decoder_bias": torch.zeros(W + 1)}, "transcoder"),
        ({"encoder_bias": torch.full((F,), torch.nan)}, "NaN"),
        ({"encoder": torch.zeros(F, W, dtype=torch.float64)}, "float64"),
    ],
)
def test_tensors_that_are_no_autoencoder_are_refused_by_name(
    store: ArtifactStore, change: dict[str, Tensor | None], message: str
) -> None:
    stored = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(InvalidArgument, match=message) as refused:
        put(store, stored, provenance())
    assert refused.value.field == "tensors"


def test_rows_of_one_that_was_deleted_since_are_missed_at_the_field_that_named_it(store: ArtifactStore) -> None:
    ref = put_autoencoder(store, "llama", Site.RESID_POST, 1)
    _, autoencoder = open_autoencoder(ref, store, loaded("llama").info, "program.edits[0].features.autoencoder")
    store.delete(ref)
    with pytest.raises(NotFound, match="deleted while it was read") as caught:
        autoencoder.rows((3,))
    assert caught.value.field == "program.edits[0].features.autoencoder"
