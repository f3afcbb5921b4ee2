"""Safetensors are served from the mapped files, as transformers loads them."""

import json
from pathlib import Path

import pytest
import torch
from gguf_files import logits_of, some_ids
from safetensors.torch import load_file, save_file
from tiny_llama import byte_tokenizer
from tiny_models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.load import load_model

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(directory: Path, model: PreTrainedModel, tensors: Tensors | None = None) -> Path:
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tensors_of(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def assert_serves(directory: Path) -> torch.Tensor:
    """As transformers does; returns the logits."""
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = some_ids()
    with torch.inference_mode():
        expected = oracle(ids).logits[0]
    found = logits_of(load_model(str(directory)).decoder, ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    assert_serves(save(tmp_path, tiny_model(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_served_in_float32(dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    save(tmp_path, tiny_model(family))
    save(tmp_path, tiny_model(family), {name: value.to(dtype) for name, value in tensors_of(tmp_path).items()})
    assert_serves(tmp_path)


def test_shards_are_served_together(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_serves(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("llama"))
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({HEAD: torch.zeros(256, 48)}, tmp_path / "b.safetensors")
    index = {"weight_map": {EMBEDDING: "a.safetensors", HEAD: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelSourceError, match=r"has the tensor lm_head\.weight twice"):
        load_model(str(tmp_path))


def test_a_checkpoint_of_the_model_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    """GPT-2's own on the hub has them, and the masks of old versions."""
    model = tiny_model("gpt2")
    save(tmp_path, model)
    tensors = {name.removeprefix("transformer."): value for name, value in tensors_of(tmp_path).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(3)}
    assert "wte.weight" in tensors
    assert_serves(save(tmp_path, model, tensors))


def test_frequencies_that_old_versions_stored_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("llama"))
    tensors = tensors_of(tmp_path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    assert_serves(save(tmp_path, tiny_model("llama"), tensors))


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_tied_embeddings_may_be_stored_under_either_name_or_both(names: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    save(tmp_path, model)
    tensors = tensors_of(tmp_path)
    shared = tensors.pop(EMBEDDING)
    assert_serves(save(tmp_path, model, tensors | {name: shared.clone() for name in names}))


def test_embeddings_that_differ_are_two_although_the_configuration_ties_them(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    plain = assert_serves(save(tmp_path, model))
    tensors = tensors_of(tmp_path)
    assert not torch.equal(assert_serves(save(tmp_path, model, tensors | {HEAD: tensors[EMBEDDING] * 2})), plain)


def test_without_either_of_two_tied_embeddings_both_are_missing(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("gemma2"))
    tensors = tensors_of(tmp_path)
    del tensors[EMBEDDING]
    save(tmp_path, tiny_model("gemma2"), tensors)
    with pytest.raises(ModelSourceError, match=rf"lacks 2 weights of a gemma2 model: {HEAD}, {EMBEDDING}"):
        load_model(str(tmp_path))


def test_a_bias_of_integers_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("llama"))
    name = "model.layers.1.mlp.up_proj.bias"
    save(tmp_path, tiny_model("llama"), tensors_of(tmp_path) | {name: torch.ones(80, dtype=torch.int64)})
    with pytest.raises(ModelSourceError, match=rf"{name} is stored as I64, which is not supported: F32, F16"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("moved", "message"), [(-4, "tensors that overlap"), (4, "bytes that belong to no tensor")])
def test_tensors_that_do_not_lie_one_behind_the_other_are_refused(moved: int, message: str, tmp_path: Path) -> None:
    save(tmp_path, tiny_model("llama"))
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    norm = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    norm[0] += moved
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    with pytest.raises(ModelSourceError, match=message):
        load_model(str(tmp_path))
