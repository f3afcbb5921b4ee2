"""Models whose dense weights are quantised when they load, against transformers with the dequantised weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import byte_tokenizer, save_tiny_llama
from tiny_models import tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.cli.options import QUANTIZE
from patchclamp_server.cpu.quantize.matrix import quantize_matrix
from patchclamp_server.cpu.stored import Format, StoredMatrix
from patchclamp_server.model.architectures import FAMILIES
from patchclamp_server.model.checkpoint import open_checkpoint
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.fingerprint import model_fingerprint
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import Silent
from patchclamp_server.model.quantization.card import Quality, store_card, stored_quality
from patchclamp_server.model.quantization.scheme import REVISION, SCHEMES, quantized_tensors
from patchclamp_server.model.source import ModelSource

pytestmark = pytest.mark.usefixtures("own_cache")

# Wide enough for blocks of 256, but not in its MLP.
WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide")
    save_tiny_llama(directory)
    LlamaForCausalLM(LlamaConfig.from_pretrained(directory, **WIDE)).save_pretrained(directory)
    return directory


def saved(family: str, directory: Path) -> Path:
    tiny_model(family).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def logits_of(model: LoadedModel, ids: list[int]) -> Tensor:
    decoder, documents = model.decoder, torch.tensor([ids])
    inputs = inputs_of(documents, 0, len(ids), decoder)
    return decoder.logits(decoder.forward(inputs, pools_for(decoder, documents)))


@torch.no_grad()
def dequantised(model: PreTrainedModel, loaded: LoadedModel) -> PreTrainedModel:
    """The model with the weights that the card of `loaded` names, as their blocks hold them."""
    card = loaded.info.quantization
    assert card is not None
    for matrix in card.matrices:
        if matrix.format == "f32":
            continue
        weight = model.get_parameter(matrix.name)
        turned = loaded.decoder.spec.family.transposed and ".h." in matrix.name
        dense = StoredMatrix.of(weight.t() if turned else weight)
        found = quantize_matrix(dense, Format[matrix.format.upper()]).matrix.dense()
        weight.copy_(found.t() if turned else found)
    return model


@pytest.mark.parametrize("scheme", ["q4_k", "q8_0", "q4_0"])
def test_a_quantised_model_computes_with_the_weights_that_its_blocks_hold(scheme: str, wide_dir: Path) -> None:
    loaded = load_model(str(wide_dir), quantize=SCHEMES[scheme])
    ids = [5, 9, 100, 42, 7]
    expected = dequantised(LlamaForCausalLM.from_pretrained(wide_dir), loaded)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(loaded, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3", "phi3"])
def test_every_wiring_of_matrices_is_quantised(family: str, tmp_path: Path) -> None:
    loaded = load_model(str(saved(family, tmp_path)), quantize=SCHEMES["q8_0"])
    ids = [5, 9, 100, 42, 7]
    plain = type(tiny_model(family)).from_pretrained(tmp_path, attn_implementation="eager")
    expected = dequantised(plain, loaded)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(loaded, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "gpt_neox"])
def test_the_plan_knows_from_headers_what_the_matrices_will_be(family: str, tmp_path: Path) -> None:
    scheme = SCHEMES["q8_0"]
    loaded = load_model(str(saved(family, tmp_path)), quantize=scheme)
    assert loaded.info.quantization is not None
    source = ModelSource(family, tmp_path)
    stored = open_checkpoint(source, Silent()).tensors.listed()
    planned = {t.name: t for t in quantized_tensors(stored, scheme, FAMILIES[loaded.info.architecture])}
    # Rows of 80 neurons are no blocks, so that some matrices stay float32.
    names = set()
    for matrix in loaded.info.quantization.matrices:
        name = matrix.name
        assert (planned[name].nbytes, planned[name].format.name.lower()) == (matrix.nbytes, matrix.format)
        names.add(name)
    assert all(planned[name] in stored for name in planned.keys() - names)


def test_rows_that_are_not_whole_blocks_get_another_format_and_the_card_says_so(
    wide_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = load_model(str(wide_dir), quantize=SCHEMES["q4_k"]).info.quantization
    assert card is not None
    formats = {matrix.name.removeprefix("model."): (matrix.format, matrix.wanted) for matrix in card.matrices}
    assert formats["layers.0.self_attn.q_proj.weight"] == ("q4_k", "")
    assert formats["embed_tokens.weight"] == ("q6_k", "")
    assert formats["layers.1.mlp.down_proj.weight"] == ("q5_0", "q4_k")
    assert "2 matrices are in q5_0: rows of 320 weights are not whole blocks of 256, as q4_k has" in caplog.text


def test_a_matrix_without_blocks_stays_as_it_is(tmp_path: Path) -> None:
    card = load_model(str(saved("llama", tmp_path)), quantize=SCHEMES["q8_0"]).info.quantization
    assert card is not None
    # 48 channels and 80 neurons.
    assert {(m.format, m.wanted, m.error) for m in card.matrices} == {("f32", "q8_0", 0.0)}
    assert card.bits_per_weight == 32


def test_the_card_adds_up_errors_and_bits(wide_dir: Path) -> None:
    card = load_model(str(wide_dir), quantize=SCHEMES["q4_k"]).info.quantization
    assert card is not None
    assert {format.format: format.bits_per_weight for format in card.formats} == {
        "q4_k": 4.5,
        "q5_0": 5.5,
        "q6_k": 6.5625,
    }
    assert sum(format.matrices for format in card.formats) == len(card.matrices) == 2 * 7 + 2
    errors = {format.format: format.relative_squared_error for format in card.formats}
    assert errors["q6_k"] < errors["q5_0"] < errors["q4_k"] < 0.01
    assert errors["q6_k"] < card.relative_squared_error < errors["q4_k"]


def test_the_fingerprint_names_the_scheme_behind_that_of_the_dense_model(wide_dir: Path) -> None:
    found = {load_model(str(wide_dir), quantize=SCHEMES[name]).info.fingerprint for name in ("q8_0", "q4_k")}
    dense = model_fingerprint(wide_dir)
    assert found == {f"{dense}-quantized-q8_0-{REVISION}", f"{dense}-quantized-q4_k-{REVISION}"}


def test_what_was_measured_of_a_model_is_on_its_card_at_the_next_load(wide_dir: Path) -> None:
    info = load_model(str(wide_dir), quantize=SCHEMES["q4_k"]).info
    assert info.quantization is not None
    assert info.quantization.quality is None
    quality = Quality(0.01, 0.9, 1.02, 12.0, 508)
    card = type(info.quantization)("q4_k", info.quantization.matrices, quality)
    store_card(info.fingerprint, card)
    assert load_model(str(wide_dir), quantize=SCHEMES["q4_k"]).info.quantization == card


def test_a_card_that_cannot_be_read_is_no_card(own_cache: Path, wide_dir: Path) -> None:
    info = load_model(str(wide_dir), quantize=SCHEMES["q8_0"]).info
    assert info.quantization is not None
    path = store_card(info.fingerprint, info.quantization)
    path.write_text("{")
    assert stored_quality(info.fingerprint) is None


def test_a_weight_that_is_not_a_number_is_refused_by_its_name(wide_dir: Path, tmp_path: Path) -> None:
    for file in wide_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = r"model.layers.1.mlp.up_proj.weight cannot be quantised to Q4_K: weight \[3, 5\] is not finite"
    with pytest.raises(ModelSourceError, match=wanted):
        load_model(str(tmp_path), quantize=SCHEMES["q4_k"])


def test_only_float32_on_a_cpu_is_quantised(wide_dir: Path) -> None:
    with pytest.raises(ModelSourceError, match="--quantize holds with --dtype float32 and --device cpu, got bfloat16"):
        load_model(str(wide_dir), quantize=SCHEMES["q4_k"], dtype=torch.bfloat16)


def test_a_file_with_formats_of_its_own_is_not_quantised_again(tiny_gguf: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"--quantize is for dense weights in safetensors; .*tiny.gguf has"):
        load_model(str(tiny_gguf), quantize=SCHEMES["q4_k"])


def test_the_command_line_knows_the_schemes_there_are() -> None:
    assert tuple(SCHEMES) == QUANTIZE
