"""GGUF files are served from their blocks: transformers' own model, dequantised from the same file, is the oracle."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import assert_serves, logits_of, some_ids, write_gguf
from stored_blocks import STORED, Kind
from tiny_models import tiny_model
from transformers import PreTrainedModel

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.conversion import converted_gguf
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.load import load_model, load_pretrained
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.model.stored_tensors import StoredTensor

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
# Blocks of K formats have 256 weights.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
pytestmark = pytest.mark.usefixtures("own_cache")


def wide_llama(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", **WIDE, **changes)


def dequantised(path: Path) -> PreTrainedModel:
    return load_pretrained(converted_gguf(path))[0]


def mostly_q4_k(name: str) -> Kind:
    """As llama.cpp mixes Q4_K_M."""
    return Kind.Q6_K if "attn_v" in name or "ffn_down" in name or "token_embd" in name else Kind.Q4_K


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.name)
def test_a_file_of_each_format_is_served_as_transformers_dequantises_it(kind: Kind, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), formats=lambda _: kind)
    assert_serves(path, dequantised(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_each_family_is_served_as_transformers_dequantises_it(family: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_inner": 96} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    path = write_gguf(tmp_path / "m.gguf", tiny_model(family, **sizes), formats=lambda _: Kind.Q8_0)
    assert_serves(path, dequantised(path))


def test_the_parts_of_a_product_may_be_of_different_formats(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), formats=mostly_q4_k)
    assert_serves(path, dequantised(path))
    assert load_model(str(path)).info.fingerprint.endswith("-gguf-Q4_K+Q6_K")


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", wide_llama(tie_word_embeddings=True), formats=mostly_q4_k)
    assert_serves(path, dequantised(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_narrow_dtype_the_weights_become_dense(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), formats=lambda _: Kind.Q8_0)
    decoder = load_model(str(path), dtype=dtype).decoder
    exact = logits_of(load_model(str(path)).decoder, some_ids())
    narrow = logits_of(decoder, some_ids())
    assert decoder.embedding.dtype == dtype
    assert isinstance(decoder.embedding.weight, torch.Tensor)
    assert float((narrow - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("part", [1, 2, 5])
def test_a_split_model_is_served_whichever_part_is_named(part: int, tmp_path: Path) -> None:
    model = wide_llama()
    whole = write_gguf(tmp_path / "whole.gguf", model, formats=mostly_q4_k)
    write_gguf(tmp_path / "m.gguf", model, formats=mostly_q4_k, tensors_in_a_part=8)
    loaded = load_model(str(tmp_path / f"m-0000{part}-of-00005.gguf"))
    assert loaded.info.name == "m"
    assert torch.equal(logits_of(loaded.decoder, some_ids()), logits_of(load_model(str(whole)).decoder, some_ids()))


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", wide_llama(), tensors_in_a_part=8)
    alone = (tmp_path / "m-00002-of-00005.gguf").rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelSourceError, match=r"says that it is part 2 of 5, not 1 of 1; parts are named NAME-00001"):
        load_model(str(alone))


def test_of_many_missing_parts_some_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-90000.gguf", tiny_model("llama"))
    with pytest.raises(ModelSourceError, match=r"m-00006-of-90000\.gguf and 89994 more beside it") as refused:
        load_model(str(path))
    assert len(str(refused.value)) < 1000


def test_parts_in_another_order_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", wide_llama(), tensors_in_a_part=8)
    second, third = (tmp_path / f"m-0000{i}-of-00005.gguf" for i in (2, 3))
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelSourceError, match=r"m-00002-of-00005\.gguf says that it is part 3 of 5, not 2 of 5"):
        load_model(str(third))


def iq4_nl(rows: int) -> tuple[np.ndarray, Kind]:
    """Rows of 256 random weights in IQ4_NL: blocks of 32 codes with a scale in float16."""
    blocks = np.random.default_rng(rows).integers(0, 256, (rows, 8, 18), dtype=np.uint8)
    blocks[:, :, :2] = np.full((rows, 8, 1), 1e-3, dtype="<f2").view(np.uint8)
    return blocks.reshape(rows, -1), Kind.IQ4_NL


def test_a_format_without_products_is_dequantised_when_loaded_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {f"blk.{layer}.ffn_up.weight": iq4_nl(512) for layer in range(2)}
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), raw=raw)
    assert_serves(path, dequantised(path))
    # One line for all of a format: real files have hundreds.
    assert "no product reads IQ4_NL where it lies: as float32 2 tensors take 1.00 MiB" in caplog.text
    assert 2 * 512 * 256 * 4 == 1 << 20


def test_queries_and_keys_in_a_format_without_products_are_rotated_like_others(tmp_path: Path) -> None:
    """llama.cpp's converter reorders their rows, whatever format they get."""
    raw = {"blk.0.attn_q.weight": iq4_nl(256), "blk.1.attn_k.weight": iq4_nl(128)}
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), raw=raw)
    assert_serves(path, dequantised(path))


def test_a_format_without_products_is_not_dequantised_before_its_memory_is_admitted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), raw={"blk.0.ffn_up.weight": iq4_nl(512)})
    taken: list[int] = []

    def admit(spec: DecoderSpec, tensors: list[StoredTensor]) -> None:
        taken.append(tracemalloc.get_traced_memory()[0] - before)
        assert any(each.format is Format.F32 and each.shape == (512, 256) for each in tensors)

    load_model(str(path))  # What is imported and remembered is there now.
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        load_model(str(path), admit=admit)
    finally:
        tracemalloc.stop()
    assert taken[0] < 512 * 256 * 4


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    """The offset of one is that of another of its shape."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    content, entries = path.read_bytes(), read_header(path).entries
    up = b"blk.1.ffn_up.weight" + struct.pack("<IQQI", 2, 48, 80, 0)
    at = content.index(up) + len(up)
    first = min(entry.offset for entry in entries.values())
    other = struct.pack("<Q", entries["blk.0.ffn_up.weight"].offset - first)
    path.write_bytes(content[:at] + other + content[at + 8 :])
    with pytest.raises(ModelSourceError, match=r"tensor blk\.1\.ffn_up\.weight begins within tensor blk\.0\.ffn_up"):
        load_model(str(path))


def test_a_format_of_integers_is_refused(tmp_path: Path) -> None:
    raw = {"blk.1.ffn_up.weight": (np.ones((512, 256), dtype=np.int8), Kind.I8)}
    path = write_gguf(tmp_path / "m.gguf", wide_llama(), raw=raw)
    with pytest.raises(
        ModelSourceError, match=r"tensor blk\.1\.ffn_up\.weight is of format I8, which is not supported"
    ):
        load_model(str(path))


def test_a_row_that_is_not_made_of_blocks_is_refused(tmp_path: Path) -> None:
    """The writer refuses it too, so the header is changed."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    entry = b"blk.1.ffn_up.weight" + (2).to_bytes(4, "little") + (48).to_bytes(8, "little") + (80).to_bytes(8, "little")
    content = path.read_bytes()
    at = content.index(entry) + len(entry)
    path.write_bytes(content[:at] + int(Kind.Q4_0).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(
        ModelSourceError, match=r"tensor blk\.1\.ffn_up\.weight: a row of 48 weights is not made of blocks"
    ):
        load_model(str(path))


def test_tensors_that_llama_cpp_permutes_are_read_in_our_order(tmp_path: Path) -> None:
    """Only the order of rows differs from the file: their bytes are the same."""
    model = wide_llama()
    path = write_gguf(tmp_path / "m.gguf", model, formats=lambda _: Kind.Q4_0)
    found = converted_gguf(path)
    served = load_model(str(path)).decoder.blocks[0].qkv.rows(torch.arange(256))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), Kind.Q4_0), Kind.Q4_0)
    assert np.array_equal(served.numpy(), expected)
    assert torch.equal(served, load_pretrained(found)[0].state_dict()[name])
