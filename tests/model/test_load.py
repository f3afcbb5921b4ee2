import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import byte_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.model.decoder import NoHooks
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.fingerprint import model_fingerprint
from patchclamp_server.model.load import load_model, load_pretrained
from patchclamp_server.model.progress import Stage
from patchclamp_server.model.sites import Site


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_info_describes_the_model(tiny_llama_dir: Path) -> None:
    info = load_model(str(tiny_llama_dir)).info
    assert (info.name, info.architecture, info.dtype, info.device) == (tiny_llama_dir.name, "llama", "float32", "cpu")
    assert (info.n_layers, info.d_model, info.d_ff, info.vocab_size) == (2, 32, 64, 259)
    assert (info.n_heads, info.n_kv_heads, info.head_dim, info.context_length) == (4, 2, 8, 256)
    assert info.sites[Site.RESID_POST] == 32
    assert info.sites[Site.MLP_POST] == 64
    assert info.has_chat_template
    assert info.fingerprint == model_fingerprint(tiny_llama_dir)


def test_activations_in_8_bits_need_weights_that_are_codes(tiny_llama_dir: Path) -> None:
    assert load_model(str(tiny_llama_dir)).info.activations == "float32"
    with pytest.raises(ModelSourceError, match="--activations int8 takes weights in formats of codes"):
        load_model(str(tiny_llama_dir), activations=torch.int8)


@pytest.mark.usefixtures("embedded_dir")
def test_the_info_says_that_activations_are_rounded_and_the_fingerprint_does_not() -> None:
    model = load_model("embedded", activations=torch.int8)
    assert (model.info.dtype, model.info.activations) == ("float32", "int8")
    assert model.info.fingerprint == load_model("embedded").info.fingerprint


def test_every_end_of_sequence_that_is_named_ends_a_generation(model_copy: Path) -> None:
    edit_json(model_copy / "generation_config.json", eos_token_id=[0, 7])
    assert load_model(str(model_copy)).eos_token_ids == {0, 2, 7}


def test_the_dtype_is_the_one_asked_for(tiny_llama_dir: Path) -> None:
    model, _ = load_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_lacks_a_weight_is_refused(model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelSourceError, match=r"lacks 1 weights of a llama model: .*up_proj"):
        load_pretrained(model_copy)


def test_a_model_that_brings_its_own_code_is_refused_and_the_code_not_run(model_copy: Path) -> None:
    edit_json(
        model_copy / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"}
    )
    (model_copy / "code.py").write_text(f"open({str(model_copy / 'ran')!r}, 'w')")
    with pytest.raises(ModelSourceError, match="architecture 'unheard_of' is not supported"):
        load_pretrained(model_copy)
    assert not (model_copy / "ran").exists()


def test_progress_passes_through_every_stage_and_no_other_bar_is_drawn(
    model_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Stage] = []

    class Recording:
        def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
            if stage not in seen:
                seen.append(stage)

    load_model(str(model_copy), progress=Recording())
    assert seen == [Stage.FINGERPRINT, Stage.PREPARE, Stage.READY]
    assert "%|" not in capfd.readouterr().err


def test_norms_without_weights_are_served(tmp_path: Path) -> None:
    """OPT may leave them out: its norms only normalise."""
    config = OPTConfig(
        vocab_size=259,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        layer_norm_elementwise_affine=False,
        enable_bias=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OPTForCausalLM(config)
    model.train(False)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path)).decoder
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        x = decoder.forward(inputs_of(ids, 0, 10, decoder), pools_for(decoder, ids), NoHooks())
        torch.testing.assert_close(decoder.logits(x), model(ids).logits[0], atol=1e-4, rtol=1e-4)


def test_the_embedded_model_loads() -> None:
    loaded = load_model("embedded")
    assert (loaded.info.name, loaded.info.n_layers, loaded.info.d_model) == ("SmolLM2-135M-Instruct", 30, 576)
    assert re.fullmatch(r"[0-9a-f]{64}-gguf-Q4_1\+Q8_0", loaded.info.fingerprint)
    assert loaded.eos_token_ids == set(loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
