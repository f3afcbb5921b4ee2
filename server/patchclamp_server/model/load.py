"""Loading gives a model that is ready to serve: decoder, tokenizer, and what the rest of the server needs to know."""

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
from patchclamp_server.model.fingerprint import model_fingerprint
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.loaded import refuse_unloaded, without_load_report
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress
from patchclamp_server.model.range_check import warn_of_overflow
from patchclamp_server.model.source import EMBEDDED, resolve, weight_files
from patchclamp_server.model.tokenizer import load_tokenizer, template_of
from patchclamp_server.model.weights import decoder_from_transformers


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
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads "embedded", a hub id, a local directory or a ``.gguf`` file, and fetches and converts it where needed.

    `activations=torch.int8` rounds what products with codes take to 8 bits (cpu/integers/): faster, less exact. It
    holds with float32 on a CPU, `batch_invariant`, for weights that are codes. By default they are of `dtype`.

    `use_codes=False` multiplies by float32 weights where the file has 4- or 8-bit codes: slower, for comparison.

    Raises ModelSourceError when there is no such model or device, when its weights are not safetensors or are not all
    there, when its architecture is not supported, or when it needs code of its own to run.
    """
    check_device(device, dtype)
    source = resolve(ref, progress)
    # What can be refused without the weights is refused before they are read, which takes minutes.
    config, tokenizer = _checked(source.directory)
    fingerprint = model_fingerprint(source.directory, progress)
    model = _load_weights(source.directory, config, dtype, progress)
    eos = end_token_ids(model, tokenizer)
    shown = progress or Silent()
    try:
        decoder = decoder_from_transformers(
            model, dtype=dtype, device=device, batch_invariant=batch_invariant, use_codes=use_codes, progress=shown
        )
        if activations not in (None, dtype):
            _round_activations(decoder, source.name, activations)
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
        activations=str(decoder.activations).removeprefix("torch."),
        sites=dict(spec.sites),
        has_chat_template=template_of(tokenizer) is not None,
    )
    shown.update(Stage.READY)
    return LoadedModel(info, decoder, tokenizer, eos)


def load_pretrained(
    directory: Path, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the transformers model and tokenizer of a local directory; runs no code of it and reads no pickle."""
    config, tokenizer = _checked(directory)
    return _load_weights(directory, config, dtype, progress), tokenizer


def _round_activations(decoder: Decoder, name: str, activations: torch.dtype) -> None:
    if activations != torch.int8:
        raise ModelSourceError(f"--activations: those of --dtype, or int8, are accepted, not {activations}")
    try:
        decoder.round_activations()
    except ValueError as error:
        raise ModelSourceError(f"{name}: {error}") from error


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
