"""A model, ready to serve: decoder, tokenizer, and what the rest of the server needs to know about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.fingerprint import model_fingerprint
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.progress import Progress, Silent, Stage, transformers_progress
from patchclamp_server.model.source import EMBEDDED, resolve
from patchclamp_server.model.weights import decoder_from_transformers


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """`eos_token_ids`: any of them ends a generation."""

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
    progress: Progress | None = None,
) -> LoadedModel:
    """Load "embedded", a hub id, a local directory or a ``.gguf`` file, fetching and converting it where needed.

    Raises ModelSourceError when there is no such model, when its weights are not safetensors or are incomplete, or
    when it needs code of its own to run.
    """
    source = resolve(ref, progress)
    fingerprint = model_fingerprint(source.directory, progress)
    model, tokenizer = load_pretrained(source.directory, dtype=dtype, progress=progress)
    eos = eos_token_ids(model, tokenizer)
    decoder = decoder_from_transformers(model, dtype=dtype, device=device, batch_invariant=batch_invariant)
    decoder.warm_up()
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
        has_chat_template=tokenizer.chat_template is not None,
    )
    (progress or Silent()).update(Stage.READY)
    return LoadedModel(info, decoder, tokenizer, eos)


def load_pretrained(
    directory: Path, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The transformers model and tokenizer of a local directory; no code of the repository runs, no pickle is read."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        with transformers_progress(progress, Stage.LOAD):
            # With output_loading_info it returns a pair, which its annotation does not know.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{directory} cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    # transformers fills what a checkpoint lacks with random numbers and warns: that is not the model that was named.
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:
        shown = ", ".join(absent[:5]) + (" …" if len(absent) > 5 else "")
        raise ModelSourceError(f"{directory} lacks {len(absent)} weights of a {type(model).__name__}: {shown}")
    return model, tokenizer


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every end-of-sequence id that the generation config, the config or the tokenizer names."""
    ids: set[int] = set()
    generation = model.generation_config.eos_token_id if model.generation_config is not None else None
    for named in (generation, getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        if named is not None:
            ids.update([named] if isinstance(named, int) else named)
    return frozenset(ids)
