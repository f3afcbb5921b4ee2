"""Interventions that others keep as files of PyTorch: what is made of them, what goes back, and what is refused."""

import argparse
import pathlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from patchclamp.torch_files import (
    read_affine,
    read_lm_steer,
    read_loreft,
    read_vectors,
    write_loreft,
    write_vectors,
)

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


@pytest.mark.parametrize(
    "keys",
    [
        (4, 15),
        ("4", "15"),
        ("layer.4", "layer.15"),
        ("layer_4", "layer_15"),
        ("direction.4", "direction.15"),
        ("model.layers.4", "model.layers.15"),
        ("transformer.h.4", "transformer.h.15"),
        ("blocks.4.hook_resid_post", "blocks.15.hook_resid_post"),
    ],
)
def test_vectors_by_layer_are_read_under_the_names_of_common_tools(tmp_path: Path, keys: tuple[object, object]) -> None:
    four, fifteen = torch.randn(WIDTH), torch.randn(1, WIDTH)
    torch.save({keys[0]: four, keys[1]: fifteen}, tmp_path / "v.pt")
    file = read_vectors(tmp_path / "v.pt")
    assert (file.kind, file.site, file.layers) == ("vector", "resid_post", (4, 15))
    assert file.provenance == {"method": "imported", "format": "torch"}
    tensors = load(file.data)
    assert torch.equal(tensors["layer.4"], four)
    assert torch.equal(tensors["layer.15"], fifteen[0])


def test_one_vector_is_of_the_layers_that_are_given(tmp_path: Path) -> None:
    vector = torch.randn(WIDTH)
    torch.save(vector, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt", layer=14).layers == (14,)
    tensors = load(read_vectors(tmp_path / "v.pt", layer=[3, 14]).data)
    assert all(torch.equal(tensors[f"layer.{layer}"], vector) for layer in (3, 14))
    with pytest.raises(ValueError, match="give layer"):
        read_vectors(tmp_path / "v.pt")


def test_the_rows_of_a_matrix_are_layers(tmp_path: Path) -> None:
    rows = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.save(rows, tmp_path / "v.pt")
    file = read_vectors(tmp_path / "v.pt", site="resid_pre")
    assert (file.site, file.layers) == ("resid_pre", (0, 1, 2, 3))
    assert torch.equal(load(file.data)["layer.2"], rows[2].float())
    assert read_vectors(tmp_path / "v.pt", layer=range(1, 3)).layers == (1, 2)
    with pytest.raises(ValueError, match="no layer 4; it has 0, 1, 2, 3"):
        read_vectors(tmp_path / "v.pt", layer=4)


def test_hidden_states_are_counted_from_the_embedding(tmp_path: Path) -> None:
    rows = torch.randn(4, WIDTH)
    torch.save(rows, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="row 0 would be layer -1; give the layers to take"):
        read_vectors(tmp_path / "v.pt", layer_offset=-1)
    file = read_vectors(tmp_path / "v.pt", layer=range(3), layer_offset=-1)
    assert file.provenance["layer_offset"] == -1
    assert torch.equal(load(file.data)["layer.0"], rows[1])


def test_what_stands_under_a_key_is_read_alone(tmp_path: Path) -> None:
    vector = torch.randn(WIDTH)
    torch.save({"directions": {3: vector}, "model": "tiny"}, tmp_path / "v.pt")
    assert torch.equal(load(read_vectors(tmp_path / "v.pt", entry="directions").data)["layer.3"], vector)
    with pytest.raises(ValueError, match="nothing is called direction; it has directions, model"):
        read_vectors(tmp_path / "v.pt", entry="direction")
    with pytest.raises(ValueError, match="'directions' is no layer"):
        read_vectors(tmp_path / "v.pt")


def test_a_hook_says_the_site_and_no_other_can_be_given(tmp_path: Path) -> None:
    torch.save({"blocks.3.hook_resid_pre": torch.ones(WIDTH)}, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt").site == "resid_pre"
    with pytest.raises(ValueError, match="its hooks are at resid_pre, not mlp_out"):
        read_vectors(tmp_path / "v.pt", site="mlp_out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a tensor"),
        ([torch.ones(WIDTH)], "found list"),
        (torch.ones(2, 3, WIDTH), r"\[2, 3, 12\]"),
        ({3: torch.ones(2, WIDTH)}, r"3 is \[2, 12\]"),
        ({3: "text"}, "3 is str"),
        ({3: torch.ones(WIDTH), "layer.3": torch.ones(WIDTH)}, "layer.3 is layer 3, and so is another"),
        ({-1: torch.ones(WIDTH)}, "row -1 would be layer -1"),
        ({"layer.3.weight": torch.ones(WIDTH)}, "'layer.3.weight' is no layer"),
        ({"model.layers.3.mlp.0": torch.ones(WIDTH)}, "is no layer"),
        ({"blocks.3.hook_q": torch.ones(WIDTH)}, "is no layer"),
        ({"blocks.3.hook_mlp_out": torch.ones(WIDTH), 4: torch.ones(WIDTH)}, "two sites"),
        ({True: torch.ones(WIDTH)}, "True is no layer"),
    ],
)
def test_what_is_no_vector_by_layer_is_refused_by_name(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=rf"v\.pt: .*{message}"):
        read_vectors(tmp_path / "v.pt")


@pytest.mark.parametrize("data", [b"", b"no file of PyTorch", b"PK\x03\x04" + bytes(40), bytes(100)])
def test_a_file_that_is_none_of_pytorch_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"v\.pt: not a file of PyTorch of tensors alone"):
        read_vectors(tmp_path / "v.pt", layer=1)


def test_an_object_of_another_library_is_refused_and_not_made(tmp_path: Path) -> None:
    torch.save({"layer.1": pathlib.PurePosixPath("x")}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="weights_only"):
        read_vectors(tmp_path / "v.pt")


def test_a_vector_goes_out_by_layer_and_comes_back(tmp_path: Path) -> None:
    vectors = {"layer.0": torch.randn(WIDTH), "layer.12": torch.randn(WIDTH)}
    written = write_vectors(save(vectors), tmp_path / "v.pt")
    assert set(torch.load(written, weights_only=True)) == {0, 12}
    tensors = load(read_vectors(written).data)
    assert all(torch.equal(tensors[name], vector) for name, vector in vectors.items())
    with pytest.raises(ValueError, match=r"scores is not a tensor of a vector"):
        write_vectors(save({"scores": torch.ones(2, 2)}), tmp_path / "h.pt")
