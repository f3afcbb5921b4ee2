"""Loading gives a model that is ready to serve: decoder, tokenizer, and what the rest of the server needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from patchclamp_server.model.checked_config import check_generation_config, check_weight_dtypes, load_config
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.device import check_device
from patchclamp_server.model.end_tokens import end_token_ids
from patchclamp_server.model.errors import ModelSourceError, foreign_errors
from patchclamp_server.model.fingerprint import model_fingerprint, quantized_fingerprint
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.loaded import refuse_unloaded, without_load_report
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress
from patchclamp_server.model.quantization.card import stored_quality
from patchclamp_server.model.quantization.quantizer import Quantizer
from patchclamp_server.model.quantization.scheme import Scheme, quantized_tensors
from patchclamp_server.model.range_check import warn_of_overflow
from patchclamp_server.model.source import EMBEDDED, resolve, weight_files
from patchclamp_server.model.spec import DecoderSpec, read_spec
from patchclamp_server.model.stored_tensors import StoredTensor, safetensors_tensors
from patchclamp_server.model.tokenizer import load_tokenizer, template_of
from patchclamp_server.model.weights import decoder_from_transformers

# This is told what will be loaded, and raises ModelSourceError where that does not fit into memory.
Admit = Callable[[DecoderSpec, list[StoredTensor]], None]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Any of `eos_token_ids` ends a generation."""

    info: ModelInfo
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]


def load_model(
    ref: str = EMBEDDED,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch_invariant: bool | None = None,
    use_codes: bool = True,
    quantize: Scheme | None = None,
    admit: Admit | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads "embedded", a hub id, a local directory or a ``.gguf`` file, and fetches and converts it where needed.

    `use_codes=False` multiplies by float32 weights where the file has 4- or 8-bit codes: slower, for comparison.
    `quantize` makes blocks of the matrices of safetensors while they load. `admit` is called before a weight is read,
    with the tensors as they will be held.

    Raises ModelSourceError when there is no such model or device, when its weights are not safetensors or are not all
    there, when its architecture is not supported, or when it needs code of its own to run.
    """
    check_device(device, dtype)
    if quantize is not None:
        _check_quantizable(ref, dtype, device)
    source = resolve(ref, progress)
    # What can be refused without the weights is refused before they are read, which takes minutes.
    config, tokenizer = _checked(source.directory)
    shown = progress or Silent()
    tensors = safetensors_tensors(weight_files(source.directory))
    if quantize is not None:
        tensors = quantized_tensors(tensors, quantize, read_spec(config).family)
    if admit is not None:
        admit(read_spec(config), tensors)
    fingerprint = model_fingerprint(source.directory, progress)
    if quantize is not None:
        fingerprint = quantized_fingerprint(fingerprint, quantize)
    model = _load_weights(source.directory, config, dtype, progress)
    eos = end_token_ids(model, tokenizer)
    quantizer = None if quantize is None else Quantizer(quantize)
    try:
        decoder = decoder_from_transformers(
            model,
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            use_codes=use_codes,
            quantizer=quantizer,
            progress=shown,
        )
        decoder.warm_up()
        warn_of_overflow(decoder, tokenizer)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelSourceError(f"{source.directory} does not fit into the memory of {device}: {error}") from error
    spec = decoder.spec
    info = ModelInfo(
        name=source.name,
        fingerprint=fingerprint,
        architecture=spec.architecture,
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        sites=dict(spec.sites),
        has_chat_template=template_of(tokenizer) is not None,
        quantization=None if quantizer is None else quantizer.card(stored_quality(fingerprint)),
    )
    shown.update(Stage.READY)
    return LoadedModel(info, decoder, tokenizer, eos)


def _check_quantizable(ref: str, dtype: torch.dtype, device: str) -> None:
    """Raises ModelSourceError where blocks would not be multiplied by, or the file has some already."""
    if dtype != torch.float32 or torch.device(device).type != "cpu":
        name = str(dtype).removeprefix("torch.")
        raise ModelSourceError(f"--quantize holds with --dtype float32 and --device cpu, got {name} and {device}")
    if ref == EMBEDDED or Path(ref).suffix.lower() == ".gguf":
        raise ModelSourceError(f"--quantize is for dense weights in safetensors; {ref} has formats of its own")


def load_pretrained(
    directory: Path, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the transformers model and tokenizer of a local directory; runs no code of it and reads no pickle."""
    config, tokenizer = _checked(directory)
    return _load_weights(directory, config, dtype, progress), tokenizer


def _checked(directory: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Loads all that does not need the data of the weights. Raises ModelSourceError when some of it is broken."""
    config = load_config(directory)
    check_generation_config(directory)
    check_weight_dtypes(weight_files(directory))
    return config, load_tokenizer(directory)


def _load_weights(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype, progress: Progress | None
) -> PreTrainedModel:
    with (
        foreign_errors(f"{directory} cannot be loaded"),
        without_load_report(),
        transformers_progress(progress, Stage.LOAD),
    ):
        # With output_loading_info this returns a pair, which its annotation does not know.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Weights of other shapes are refused by name afterwards; transformers would print a table.
            ignore_mismatched_sizes=True,
        )
    model: PreTrainedModel = loaded[0]
    refuse_unloaded(directory, model, loaded[1])
    return model
