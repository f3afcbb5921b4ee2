"""Interventions that others keep as files of PyTorch: what is made of them, what goes back, and what is refused."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from patchclamp.torch_files import read_affine, read_lm_steer, read_loreft, write_loreft

WIDTH, RANK = 12, 3
BLOCK_OUTPUT = "intkey_layer.{}.comp.block_output.unit.pos.nunit.1#0.bin"


def loreft(seed: int) -> dict[str, torch.Tensor]:
    """As pyreft's LoreftIntervention.state_dict has it: a linear layer, and the rotation [width, rank]."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(WIDTH, RANK)
    return {**linear.state_dict(), "rotate_layer": torch.linalg.qr(torch.randn(WIDTH, RANK))[0]}


def test_a_directory_of_pyreft_becomes_a_subspace_that_computes_the_same(tmp_path: Path) -> None:
    states = {layer: loreft(layer) for layer in (4, 15)}
    for layer, state in states.items():
        torch.save(state, tmp_path / BLOCK_OUTPUT.format(layer))
    file = read_loreft(tmp_path)
    assert (file.kind, file.site, file.layers) == ("subspace", "resid_post", (4, 15))
    tensors, h = load(file.data), torch.randn(WIDTH)
    for layer, state in states.items():
        # The forward of LoreftIntervention.
        source = torch.nn.functional.linear(h, state["weight"], state["bias"])
        expected = h + (source - h @ state["rotate_layer"]) @ state["rotate_layer"].T
        rotation, weight, bias = (tensors[f"layer.{layer}.{name}"] for name in ("rotation", "weight", "bias"))
        torch.testing.assert_close(h + rotation.T @ (weight @ h + bias - rotation @ h), expected)


@pytest.mark.parametrize(
    ("name", "layer", "site"),
    [
        ("intkey_layer_7_repr_block_output_unit_pos_nunit_1#0.bin", 7, "resid_post"),
        ("intkey_layer.7.comp.block_input.unit.pos.nunit.1#0.bin", 7, "resid_pre"),
        ("intkey_layer.7.comp.mlp_output.unit.pos.nunit.1#0.bin", 7, "mlp_out"),
        ("intkey_layer.7.comp.model.layers[7].output.unit.pos.nunit.1#0.bin", 7, "resid_post"),
    ],
)
def test_names_of_both_versions_of_pyvene_are_known(tmp_path: Path, name: str, layer: int, site: str) -> None:
    torch.save(loreft(0), tmp_path / name)
    file = read_loreft(tmp_path)
    assert (file.layers, file.site) == ((layer,), site)


def test_a_subspace_goes_back_into_files_of_pyreft(tmp_path: Path) -> None:
    state = loreft(1)
    torch.save(state, tmp_path / BLOCK_OUTPUT.format(2))
    [written] = write_loreft(read_loreft(tmp_path).data, tmp_path / "out")
    assert written.name == BLOCK_OUTPUT.format(2)
    again = torch.load(written, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def loreft_of(file: Path, h: torch.Tensor) -> torch.Tensor:
    """The forward of LoreftIntervention, for the state of a file."""
    state = torch.load(file, weights_only=True)
    rotate = state["rotate_layer"]
    torch.testing.assert_close(rotate.T @ rotate, torch.eye(rotate.shape[1]), rtol=1e-5, atol=1e-5)
    source = torch.nn.functional.linear(h, state["weight"], state["bias"])
    return h + (source - h @ rotate) @ rotate.T


def test_a_vector_goes_into_files_of_pyreft_as_what_add_does(tmp_path: Path) -> None:
    vectors = {f"layer.{layer}": torch.randn(WIDTH) for layer in (2, 5)}
    files = write_loreft(save(vectors), tmp_path, site="resid_pre", strength=-1.5)
    assert [file.name for file in files] == [
        BLOCK_OUTPUT.format(layer).replace("block_output", "block_input") for layer in (2, 5)
    ]
    h = torch.randn(4, WIDTH)
    for file, vector in zip(files, vectors.values(), strict=True):
        torch.testing.assert_close(loreft_of(file, h), h - 1.5 * vector, rtol=1e-4, atol=1e-5)
    again = read_loreft(tmp_path)
    assert (again.kind, again.site, again.layers) == ("subspace", "resid_pre", (2, 5))
    with pytest.raises(ValueError, match="layer 0 is a vector of zeros"):
        write_loreft(save({"layer.0": torch.zeros(WIDTH)}), tmp_path)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, WIDTH)])
def test_an_affine_map_goes_into_files_of_pyreft_as_it_computes(tmp_path: Path, bias: torch.Tensor | None) -> None:
    torch.manual_seed(2)
    left, right, matrix = torch.randn(WIDTH, RANK), torch.randn(WIDTH, RANK), torch.randn(WIDTH, WIDTH)
    tensors = {"layer.1.left": left, "layer.1.right": right, "layer.3.matrix": matrix}
    if bias is not None:
        tensors |= {"layer.1.bias": bias, "layer.3.bias": bias.flip(0)}
    of_factors, of_matrix = write_loreft(save(tensors), tmp_path)
    h, added = torch.randn(5, WIDTH), torch.zeros(WIDTH) if bias is None else bias
    torch.testing.assert_close(loreft_of(of_factors, h), h @ right @ left.T + added, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loreft_of(of_matrix, h), h @ matrix.T + added.flip(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="strength is of vectors"):
        write_loreft(save(tensors), tmp_path, strength=2.0)


def test_a_bare_subspace_does_not_fit_into_files_of_pyreft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 0 has no weight"):
        write_loreft(save({"layer.0.rotation": torch.eye(4)[:2]}), tmp_path)


def test_what_is_no_loreft_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file is called"):
        read_loreft(tmp_path)
    torch.save({"proj.weight": torch.ones(2, 2)}, tmp_path / BLOCK_OUTPUT.format(2))
    with pytest.raises(ValueError, match=r"layer\.2.*found proj\.weight"):
        read_loreft(tmp_path)


def test_two_interventions_of_one_layer_and_two_sites_are_refused(tmp_path: Path) -> None:
    torch.save(loreft(0), tmp_path / BLOCK_OUTPUT.format(2))
    torch.save(loreft(1), tmp_path / BLOCK_OUTPUT.format(2).replace("#0", "#1"))
    with pytest.raises(ValueError, match="layer 2 has two"):
        read_loreft(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    torch.save(loreft(0), other / BLOCK_OUTPUT.format(2))
    torch.save(loreft(0), other / BLOCK_OUTPUT.format(3).replace("block_output", "mlp_output"))
    with pytest.raises(ValueError, match="mlp_out"):
        read_loreft(other)


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"weight": Evil()}, tmp_path / BLOCK_OUTPUT.format(2))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        read_loreft(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_lm_steer_becomes_the_map_that_it_applies(tmp_path: Path) -> None:
    first, second, values = torch.randn(2, WIDTH, 4), torch.randn(2, WIDTH, 4), (1.0, -0.5)
    state = {"steer.projector1": first, "steer.projector2": second, "steer.lm_head.weight": torch.ones(3, WIDTH)}
    torch.save([argparse.Namespace(epsilon=1e-3), state], tmp_path / "steer.pt")
    file = read_lm_steer(tmp_path / "steer.pt", layer=29, epsilon=1e-3, values=values)
    assert (file.kind, file.site, file.layers) == ("affine_map", "resid_post", (29,))
    h = torch.randn(1, WIDTH)
    delta = sum(v * h @ a @ b.T for v, a, b in zip(values, first, second, strict=True))
    torch.testing.assert_close(load(file.data)["layer.29.matrix"] @ h[0], (h + 1e-3 * delta)[0])
    with pytest.raises(ValueError, match="2 steers"):
        read_lm_steer(tmp_path / "steer.pt", layer=29, epsilon=1e-3)


def test_a_linear_layer_becomes_an_affine_map(tmp_path: Path) -> None:
    linear = torch.nn.Linear(WIDTH, WIDTH)
    torch.save(linear.state_dict(), tmp_path / "map.pt")
    tensors, h = load(read_affine(tmp_path / "map.pt", layer=3).data), torch.randn(WIDTH)
    torch.testing.assert_close(tensors["layer.3.matrix"] @ h + tensors["layer.3.bias"], linear(h))
