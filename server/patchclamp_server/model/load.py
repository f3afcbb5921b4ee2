"""Loading gives a model that is ready to serve: decoder, tokenizer, and what the rest of the server needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from patchclamp_server.model.checkpoint import open_checkpoint
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.device import check_device
from patchclamp_server.model.errors import ModelSourceError, foreign_errors
from patchclamp_server.model.fingerprint import quantized_fingerprint
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.loaded import refuse_unloaded_by_transformers, without_load_report
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress
from patchclamp_server.model.quantization.card import stored_quality
from patchclamp_server.model.quantization.quantizer import Quantizer
from patchclamp_server.model.quantization.scheme import Scheme, quantized_tensors
from patchclamp_server.model.range_check import warn_of_overflow
from patchclamp_server.model.source import EMBEDDED, ModelSource, resolve
from patchclamp_server.model.spec import DecoderSpec, read_spec
from patchclamp_server.model.stored_tensors import StoredTensor
from patchclamp_server.model.tokenizer import template_of
from patchclamp_server.model.weights import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    activations: torch.dtype | None = None,
    use_codes: bool = True,
    quantize: Scheme | None = None,
    admit: Admit | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads "embedded", a hub id, a local directory or a ``.gguf`` file, and fetches it where needed.

    Weights stay in their files, which are mapped into memory, on a CPU in float32. Elsewhere they become dense.

    `activations=torch.int8` rounds what products with codes take to 8 bits (cpu/integers/): faster, less exact. It
    holds with float32 on a CPU, `batch_invariant`, for weights that are codes. By default they are of `dtype`.

    `use_codes=False` multiplies by float32 weights where the file has 4- or 8-bit codes: slower, for comparison.
    `quantize` makes blocks of the matrices of safetensors while they load. `admit` is called before a weight is read,
    with the tensors as they will be held.

    Raises ModelSourceError when there is no such model or device, when its weights are not safetensors or are not all
    there, when its architecture is not supported, or when it needs code of its own to run.
    """
    check_device(device, dtype)
    if quantize is not None:
        _check_quantizable(ref, dtype, device)
    shown = progress or Silent()
    source = resolve(ref, shown)
    checkpoint = open_checkpoint(source, shown)
    if admit is not None:
        own, spec = checkpoint.tensors.listed(), read_spec(checkpoint.config)
        admit(spec, own if quantize is None else quantized_tensors(own, quantize, spec.family))
    fingerprint = checkpoint.fingerprint()
    if quantize is not None:
        fingerprint = quantized_fingerprint(fingerprint, quantize)
    quantizer = None if quantize is None else Quantizer(quantize)
    tokenizer = checkpoint.tokenizer
    try:
        decoder = decoder_of(
            checkpoint.config,
            checkpoint.tensors,
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            use_codes=use_codes,
            quantizer=quantizer,
            progress=shown,
        )
        if activations not in (None, dtype):
            _round_activations(decoder, source.name, activations)
        decoder.warm_up()
        warn_of_overflow(decoder, tokenizer)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelSourceError(f"{source.path} does not fit into the memory of {device}: {error}") from error
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
        activations=str(decoder.activations).removeprefix("torch."),
        sites=dict(spec.sites),
        has_chat_template=template_of(tokenizer) is not None,
        quantization=None if quantizer is None else quantizer.card(stored_quality(fingerprint)),
    )
    shown.update(Stage.READY)
    return LoadedModel(info, decoder, tokenizer, checkpoint.eos_token_ids)


def _check_quantizable(ref: str, dtype: torch.dtype, device: str) -> None:
    """Raises ModelSourceError where blocks would not be multiplied by, or the file has some already."""
    if dtype != torch.float32 or torch.device(device).type != "cpu":
        name = str(dtype).removeprefix("torch.")
        raise ModelSourceError(f"--quantize holds with --dtype float32 and --device cpu, got {name} and {device}")
    if ref == EMBEDDED or Path(ref).suffix.lower() == ".gguf":
        raise ModelSourceError(f"--quantize is for dense weights in safetensors; {ref} has formats of its own")


def _round_activations(decoder: Decoder, name: str, activations: torch.dtype) -> None:
    if activations != torch.int8:
        raise ModelSourceError(f"--activations: those of --dtype, or int8, are accepted, not {activations}")
    try:
        decoder.round_activations()
    except ValueError as error:
        raise ModelSourceError(f"{name}: {error}") from error


def load_pretrained(
    directory: Path, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads the transformers model and tokenizer of a local directory, which tests and benchmarks compare with; runs no
    code of it and reads no pickle."""
    # This takes seconds to import, and models are served without it.
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(ModelSource(directory.name, directory), progress or Silent())
    with (
        foreign_errors(f"{directory} cannot be loaded"),
        without_load_report(),
        transformers_progress(progress, Stage.LOAD),
    ):
        # With output_loading_info this returns a pair, which its annotation does not know.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    refuse_unloaded_by_transformers(directory, type(model).__name__, loaded[1])
    return model, checkpoint.tokenizer
