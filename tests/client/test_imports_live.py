"""Files of others from Python and the command line: what is stored, what is said of it, and what goes out again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from live import LiveServer
from safetensors.torch import load, save, save_file

from patchclamp import Client, PatchclampError
from patchclamp.cli import main
from patchclamp.torch_files import read_vectors

WIDTH = 32


@pytest.fixture(autouse=True)
def here(live_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", live_server.address)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[Client]:
    with Client(live_server.address) as client:
        yield client


def control_vector(name: str, numbers: range) -> None:
    writer = gguf.GGUFWriter(name, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for number in numbers:
        writer.add_tensor(f"direction.{number}", np.full(WIDTH, number + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["vectors", "put", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_control_vector_with_direction_0_is_stored_and_the_command_says_where_its_rows_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    control_vector("v.gguf", range(2))
    assert main(["vectors", "put", "v.gguf"]) == 0
    printed = capsys.readouterr()
    assert '{"layer.0": "direction.0", "layer.1": "direction.1"}' in printed.out
    assert "warning: direction.0 is layer 0" in printed.err


def test_a_layer_offset_goes_with_the_file(capsys: pytest.CaptureFixture[str], client: Client) -> None:
    control_vector("v.gguf", range(1, 3))
    artifact = stored(capsys, "v.gguf", "--layer-offset", "-1")
    assert artifact["imported_from"] == {"layer.0": "direction.1", "layer.1": "direction.2"}
    assert artifact["import_warnings"] == []
    assert client.put_artifact(Path("v.gguf"), format="gguf", layer_offset=-1).id == artifact["id"]


def test_tensors_are_named_by_options(capsys: pytest.CaptureFixture[str], client: Client) -> None:
    rows = torch.randn(3, WIDTH)
    save_file({"steer": rows[0].clone(), "all": rows}, "v.safetensors")
    artifact = stored(capsys, "v.safetensors", "--tensor", "layer.0=steer", "--tensor", "layer.1=all[2]")
    assert artifact["imported_from"] == {"layer.0": "steer", "layer.1": "all[2]"}
    assert torch.equal(load(client.download_artifact(artifact["id"]))["layer.1"], rows[2])
    with pytest.raises(PatchclampError, match=r"header\.tensor_names\['layer\.0'\]: the file has no tensor 'lost'"):
        client.put_artifact(Path("v.safetensors"), tensor_names={"layer.0": "lost"})


def test_vectors_of_pytorch_go_in_and_come_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = torch.randn(3, WIDTH)
    torch.save({"vectors": rows}, "v.pt")
    options = ["--torch", "vectors", "--entry", "vectors", "--layer-offset", "-1", "--layer", "0-1"]
    artifact = stored(capsys, "v.pt", *options, "--site", "resid_pre", "--name", "of_torch")
    assert (artifact["kind"], artifact["site"], artifact["layers"]) == ("vector", "resid_pre", [0, 1])
    assert artifact["provenance"] == {"method": "imported", "format": "torch", "layer_offset": -1}
    assert main(["vectors", "export", "of_torch", "-o", "out.pt"]) == 0
    assert torch.equal(load(read_vectors("out.pt").data)["layer.1"], rows[2])


def test_head_lists_of_others_go_in_and_come_out_by_the_name_of_the_file(
    capsys: pytest.CaptureFixture[str], live_server: LiveServer
) -> None:
    info = live_server.model.info
    gates = np.linspace(0, 1, info.n_layers * info.n_kv_heads).reshape(info.n_layers, info.n_kv_heads)
    np.savetxt("full_attention_heads.tsv", gates, delimiter="\t")
    artifact = stored(capsys, "full_attention_heads.tsv", "--name", "duo")
    assert (artifact["kind"], artifact["evidence"]) == ("head_set", {"threshold": 0.5})
    assert main(["vectors", "export", "duo", "-o", "out.tsv"]) == 0
    assert np.allclose(np.loadtxt("out.tsv", delimiter="\t"), gates)
    Path("heads.yaml").write_text('attn_head_set: "1-1,0-0"\nmodel_name_or_path: "lab/model"\n')
    listed = stored(capsys, "heads.yaml", "--name", "qr")
    assert listed["provenance"]["model_name_or_path"] == "lab/model"
    assert main(["vectors", "export", "qr", "-o", "out.yaml"]) == 0
    assert 'attn_head_set: "1-1,0-0"' in Path("out.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["v.pt"], "say with --torch what a file of PyTorch holds"),
        (["v.safetensors", "--entry", "x"], "--entry is for --torch"),
        (["v.safetensors", "--layer", "1"], "--layer is for --torch"),
        (["v.pt", "--torch", "vectors"], "give layer"),
        (["v.pt", "--torch", "vectors", "--epsilon", "1"], "--torch vectors takes no --epsilon"),
        (["v.pt", "--torch", "vectors", "--tensor", "a=b"], "leave --kind, --format and --tensor out"),
        (["v.pt", "--torch", "affine", "--layer", "1-2"], "needs one --layer"),
        (["v.safetensors", "--tensor", "layer.1"], "expected NAME=TENSOR"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.ones(WIDTH), "v.pt")
    Path("v.safetensors").write_bytes(save({"layer.1": torch.ones(WIDTH)}))
    try:
        status: object = main(["vectors", "put", *options])
    except SystemExit as end:
        status = end.code
    assert status
    assert told in capsys.readouterr().err


def test_what_is_no_vector_is_not_written_for_pytorch(capsys: pytest.CaptureFixture[str], client: Client) -> None:
    neurons = save({"layer.1.neurons": torch.tensor([1])})
    client.put_artifact(neurons, kind="neuron_set", tags=["of_neurons"])
    assert main(["vectors", "export", "of_neurons", "-o", "out.pt"]) != 0
    assert "holds a vector here, not a neuron_set" in capsys.readouterr().err
    assert not Path("out.pt").exists()
