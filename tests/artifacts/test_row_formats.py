"""Files of autoencoders: what SAELens and Gemma Scope write computes here what it computes there, or is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchclamp_server.artifacts import tensor_file
from patchclamp_server.artifacts.autoencoder_spec import autoencoder_spec
from patchclamp_server.artifacts.autoencoders import Autoencoder
from patchclamp_server.artifacts.formats.base import CannotExpress, MalformedFile
from patchclamp_server.artifacts.row_formats import ROW_FORMATS, Beside
from patchclamp_server.artifacts.row_formats.hook_names import hook_of_place, place_of_hook
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.sites import PUBLIC_SITES, Site

F, W = 40, 6
HOOK = "blocks.3.hook_resid_post"
NEW: dict[str, Any] = {
    "architecture": "standard",
    "d_in": W,
    "d_sae": F,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.12.1", "model_name": "tiny", "hook_name": HOOK, "prepend_bos": True},
}
OLD: dict[str, Any] = {
    "architecture": "standard",
    "d_in": W,
    "d_sae": F,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "hook_name": HOOK,
    "hook_layer": 3,
    "hook_head_index": None,
    "model_name": "tiny",
    "normalize_activations": "none",
}
OLDEST = {"d_in": W, "d_sae": F, "hook_point": HOOK, "hook_point_layer": 3, "hook_point_head_index": None}


def weights(**others: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {
        "W_enc": torch.randn(W, F),
        "b_enc": torch.randn(F),
        "W_dec": torch.randn(F, W),
        "b_dec": torch.randn(W),
    }
    return found | others


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 7 * W * 4)


def imported(store: ArtifactStore, path: Path, format: str, beside: Beside) -> ArtifactInfo:
    with ROW_FORMATS[format].open(path, beside) as opened:
        return store.put_rows(
            ArtifactKind.AUTOENCODER,
            opened.tensors,
            model_fingerprint="m",
            site=opened.site,
            provenance=opened.provenance,
        )


def from_saelens(
    store: ArtifactStore,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    beside: Beside | None = None,
) -> Autoencoder:
    path = tmp_path / "sae_weights.safetensors"
    save_file(tensors, path)
    beside = beside or Beside(json.dumps(config))
    info = imported(store, path, "saelens", beside)
    return loaded(store, info)


def loaded(store: ArtifactStore, info: ArtifactInfo) -> Autoencoder:
    return Autoencoder(autoencoder_spec(info.site, info.provenance), store.open(info.id)[1])


def theirs(x: Tensor, w: dict[str, Tensor], *, subtract: bool = True) -> NDArray[np.float32]:
    """Pre-activations as SAELens writes them, x @ W_enc + b_enc."""
    found: NDArray[np.float32] = ((x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]).numpy()
    return found


def close(found: Tensor, want: NDArray[Any]) -> None:
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [NEW, OLD, OLDEST], ids=["version 6", "versions 3 to 5", "versions before"])
def test_a_relu_autoencoder_of_every_version_of_the_configuration(
    store: ArtifactStore, tmp_path: Path, config: dict[str, Any]
) -> None:
    w, x = weights(), torch.randn(5, W)
    autoencoder = from_saelens(store, tmp_path, config, w)
    f = np.maximum(theirs(x, w), 0)
    close(autoencoder.encode(x), f)
    close(autoencoder.decode(autoencoder.encode(x)), f @ w["W_dec"].numpy() + w["b_dec"].numpy())
    assert (autoencoder.spec.site, autoencoder.spec.layer) == (Site.RESID_POST, 3)


def test_a_jumprelu_autoencoder_of_which_nothing_is_subtracted(store: ArtifactStore, tmp_path: Path) -> None:
    w, x = weights(threshold=torch.rand(F) * 2), torch.randn(5, W)
    config = NEW | {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    p = theirs(x, w, subtract=False)
    close(from_saelens(store, tmp_path, config, w).encode(x), np.where(p > w["threshold"].numpy(), np.maximum(p, 0), 0))


@pytest.mark.parametrize(
    "config",
    [
        NEW | {"architecture": "topk", "k": 4.0},
        OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        OLDEST | {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}},
    ],
)
def test_a_topk_autoencoder_of_every_version(store: ArtifactStore, tmp_path: Path, config: dict[str, Any]) -> None:
    w, x = weights(), torch.randn(5, W)
    p = torch.from_numpy(theirs(x, w))
    top = p.topk(4)
    close(
        from_saelens(store, tmp_path, config, w).encode(x),
        torch.zeros_like(p).scatter(1, top.indices, top.values.relu()).numpy(),
    )


def test_activations_rescaled_by_the_norm_of_the_decoder_are_folded_in(store: ArtifactStore, tmp_path: Path) -> None:
    w, x = weights(), torch.randn(5, W)
    norms = w["W_dec"].norm(dim=1)
    config = NEW | {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    autoencoder = from_saelens(store, tmp_path, config, w)
    p = torch.from_numpy(theirs(x, w)) * norms
    top = p.topk(4)
    f = torch.zeros_like(p).scatter(1, top.indices, top.values.relu())
    close(autoencoder.encode(x), f.numpy())
    close(autoencoder.decode(f), ((f / norms) @ w["W_dec"] + w["b_dec"]).numpy())


def test_a_finetuned_scale_is_folded_into_the_decoder(store: ArtifactStore, tmp_path: Path) -> None:
    w = weights(scaling_factor=torch.rand(F) + 0.5)
    autoencoder = from_saelens(store, tmp_path, OLD | {"finetuning_scaling_factor": True}, w)
    f = torch.rand(3, F)
    close(autoencoder.decode(f), (f * w["scaling_factor"] @ w["W_dec"] + w["b_dec"]).numpy())


def test_a_transcoder_has_a_second_hook(store: ArtifactStore, tmp_path: Path) -> None:
    w = weights(W_dec=torch.randn(F, 9), b_dec=torch.randn(9))
    config = NEW | {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 9}
    config["metadata"] = {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"}
    autoencoder = from_saelens(store, tmp_path, config, w)
    x = torch.randn(5, W)
    close(autoencoder.encode(x), np.maximum(theirs(x, w, subtract=False), 0))
    spec = autoencoder.spec
    assert (spec.site, spec.output_site, spec.output_layer) == (Site.RESID_MID, Site.MLP_OUT, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_kept(store: ArtifactStore, tmp_path: Path, dtype: torch.dtype) -> None:
    w = {name: tensor.to(dtype) for name, tensor in weights().items()}
    autoencoder = from_saelens(store, tmp_path, NEW, w)
    assert set(autoencoder.file.dtypes.values()) == {dtype}
    assert torch.equal(autoencoder.file.tensor("encoder"), w["W_enc"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "architecture: 'gated'"),
        ({"architecture": ["standard"]}, "architecture: ['standard']"),
        ({"architecture": "skip_transcoder"}, "architecture: 'skip_transcoder'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations: 'expected_average_only_in'"),
        ({"metadata": {"hook_name": "blocks.3.ln2.hook_normalized"}}, "'blocks.3.ln2.hook_normalized' is no site"),
        ({"metadata": {"hook_name": "hook_embed"}}, "'hook_embed' is no site"),
        ({"metadata": {"hook_name": HOOK, "hook_head_index": 2}}, "hook_head_index: 2"),
        ({"metadata": {}}, "hook_name is missing"),
        ({"architecture": "topk"}, "k: must be a whole number"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(
    store: ArtifactStore, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        from_saelens(store, tmp_path, NEW | change, weights())
    assert refused.value.field == "config"
    assert message in refused.value.message


def test_site_and_layer_that_are_given_take_the_place_of_a_hook_that_is_no_site(
    store: ArtifactStore, tmp_path: Path
) -> None:
    config = json.dumps(NEW | {"metadata": {"hook_name": "blocks.3.hook_mlp_in"}})
    autoencoder = from_saelens(store, tmp_path, {}, weights(), Beside(config, Site.RESID_MID, 3))
    assert (autoencoder.spec.site, autoencoder.spec.layer) == (Site.RESID_MID, 3)


@pytest.mark.parametrize("config", ["", "[1]", "{", '{"architecture": "standard", "architecture": "topk"}'])
def test_a_configuration_that_is_none_is_refused(store: ArtifactStore, tmp_path: Path, config: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        from_saelens(store, tmp_path, {}, weights(), Beside(config))
    assert refused.value.field == "config"


@pytest.mark.parametrize(
    "tensors",
    [
        weights(W_gate=torch.zeros(W)),
        weights(W_enc=torch.zeros(F)),
        {"b_enc": torch.zeros(F)},
        weights(scaling_factor=torch.full((F,), 2.0)),
        weights(scaling_factor=torch.ones(3)),
        weights(scaling_factor=torch.tensor(1.0)),
    ],
)
def test_weights_of_another_layout_are_refused(
    store: ArtifactStore, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(MalformedFile):
        from_saelens(store, tmp_path, NEW, tensors)


@pytest.mark.parametrize(
    "site", [site for site in PUBLIC_SITES if site not in (Site.MLP_GATE, Site.MLP_UP)], ids=lambda site: site.value
)
def test_every_site_has_the_hook_that_it_is(site: Site) -> None:
    assert place_of_hook(hook_of_place(site, 7, PUBLIC_SITES), PUBLIC_SITES) == (site, 7)


def test_the_hook_before_the_activation_function_is_the_gate_or_without_one_the_up_projection() -> None:
    assert place_of_hook("blocks.1.mlp.hook_pre", PUBLIC_SITES) == (Site.MLP_GATE, 1)
    assert place_of_hook("blocks.1.mlp.hook_pre", [Site.MLP_UP]) == (Site.MLP_UP, 1)
    assert place_of_hook("model.layers.11", PUBLIC_SITES) == (Site.RESID_POST, 11)
    assert hook_of_place(Site.MLP_UP, 1, PUBLIC_SITES) == "blocks.1.mlp.hook_pre_linear"


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (NEW, {}),
        (NEW | {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": False}, {}),
        (NEW | {"architecture": "jumprelu"}, {"threshold": torch.rand(F)}),
    ],
)
def test_what_came_from_saelens_goes_back_to_it(
    store: ArtifactStore, tmp_path: Path, config: dict[str, Any], others: dict[str, Tensor]
) -> None:
    w = weights(**others)
    path = tmp_path / "in.safetensors"
    save_file(w, path)
    info = imported(store, path, "saelens", Beside(json.dumps(config)))
    out = tmp_path / "out.safetensors"
    write = ROW_FORMATS["saelens"].write
    assert write is not None
    written = json.loads(write(info, store.open(info.id)[1], out))
    back = load_file(out)
    assert back.keys() == w.keys()
    assert all(torch.equal(back[name], w[name]) for name in w)
    assert written["metadata"]["hook_name"] == HOOK
    same = ("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations")
    assert {name: written[name] for name in same} == {name: config[name] for name in same}
    assert written.get("k") == config.get("k")


def test_a_transcoder_of_topk_has_no_place_in_saelens(store: ArtifactStore, tmp_path: Path) -> None:
    said = {"layer": 1, "function": "topk", "k": 3, "subtracted": "nothing"}
    said |= {"output_site": "mlp_out", "output_layer": 1}
    stored = {"encoder": torch.ones(F, W), "decoder": torch.ones(F, W)}
    stored |= {"encoder_bias": torch.ones(F), "decoder_bias": torch.ones(W)}
    info = store.put(ArtifactKind.AUTOENCODER, stored, model_fingerprint="m", site=Site.RESID_MID, provenance=said)
    write = ROW_FORMATS["saelens"].write
    assert write is not None
    with pytest.raises(CannotExpress):
        write(info, store.open(info.id)[1], tmp_path / "out")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("fortran", [False, True])
def test_gemma_scope_is_read_at_the_site_and_layer_that_are_given(
    store: ArtifactStore, tmp_path: Path, save: Any, fortran: bool
) -> None:
    w = weights(threshold=torch.rand(F))
    path = tmp_path / "params.npz"
    arrays = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in w.items()}
    if fortran:
        arrays = {name: np.asfortranarray(array) for name, array in arrays.items()}
    save(path, **arrays)
    info = imported(store, path, "gemma_scope_npz", Beside(site=Site.MLP_OUT, layer=20))
    autoencoder = loaded(store, info)
    x = torch.randn(5, W)
    p = theirs(x, w, subtract=False)
    close(autoencoder.encode(x), np.where(p > w["threshold"].numpy(), np.maximum(p, 0), 0))
    close(autoencoder.decode(torch.eye(F)), (w["W_dec"] + w["b_dec"]).numpy())
    assert (autoencoder.spec.site, autoencoder.spec.layer) == (Site.MLP_OUT, 20)
    assert [each.name for each in tmp_path.iterdir() if "unpacked" in each.name] == []


def npz(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


ARRAYS = {name: tensor.numpy() for name, tensor in weights(threshold=torch.rand(F)).items()}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        npz(**ARRAYS)[:-40],
        npz(**{name: ARRAYS[name] for name in ("W_enc", "b_enc")}),
        npz(**ARRAYS | {"b_enc": ARRAYS["b_enc"].astype(np.float64)}),
        npz(**ARRAYS | {"b_enc": ARRAYS["b_enc"].astype(object)}),
        npz(**ARRAYS | {"W_enc": np.zeros(3, dtype=np.float32)}),
    ],
)
def test_what_is_not_gemma_scope_is_refused(store: ArtifactStore, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "params.npz"
    path.write_bytes(data)
    with pytest.raises(MalformedFile):
        imported(store, path, "gemma_scope_npz", Beside(site=Site.MLP_OUT, layer=20))


def test_gemma_scope_without_site_or_layer_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    path.write_bytes(npz(**ARRAYS))
    for beside, field in ((Beside(), "site"), (Beside(site=Site.MLP_OUT), "layer")):
        with pytest.raises(InvalidArgument) as refused:
            imported(store, path, "gemma_scope_npz", beside)
        assert refused.value.field == field


@pytest.mark.parametrize("remote", [False, True])
def test_stored_by_rows_is_stored_to_the_same_bytes(store: ArtifactStore, tmp_path: Path, remote: bool) -> None:
    store = ArtifactStore(f"memory://{tmp_path.name}-{id(tmp_path)}") if remote else store
    w = weights()
    info = imported(store, _saved(tmp_path, w), "saelens", Beside(json.dumps(NEW)))
    whole = {"encoder": w["W_enc"].T.contiguous(), "encoder_bias": w["b_enc"]}
    whole |= {"decoder": w["W_dec"], "decoder_bias": w["b_dec"]}
    again = store.put(
        ArtifactKind.AUTOENCODER, whole, model_fingerprint="m", site=info.site, provenance=info.provenance
    )
    assert again.id == info.id
    assert torch.equal(store.open(info.id)[1].tensor("decoder"), w["W_dec"])


def test_a_large_autoencoder_is_not_loaded_where_another_kind_is_asked_for(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = imported(store, _saved(tmp_path, weights()), "saelens", Beside(json.dumps(NEW)))
    assert store.get(info.id).info.kind is ArtifactKind.AUTOENCODER
    monkeypatch.setattr("patchclamp_server.artifacts.store.MAX_WHOLE_BYTES", 100)
    with pytest.raises(FailedPrecondition, match="by rows alone"):
        ArtifactStore(tmp_path / "store").get(info.id)


def test_an_autoencoder_that_is_deleted_while_it_is_read_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    info = imported(store, _saved(tmp_path, weights()), "saelens", Beside(json.dumps(NEW)))
    _, file = store.open(info.id)
    store.delete(info.id)
    with pytest.raises(NotFound):
        file.tensor("decoder")


def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    w = weights()
    w["W_dec"][-1, -1] = torch.inf
    with pytest.raises(InvalidArgument, match="decoder holds NaN or Inf"):
        imported(store, _saved(tmp_path, w), "saelens", Beside(json.dumps(NEW)))
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def _saved(tmp_path: Path, w: dict[str, Tensor]) -> Path:
    path = tmp_path / "sae_weights.safetensors"
    save_file(w, path)
    return path
