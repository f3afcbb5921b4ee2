"""Autoencoders as SAELens keeps them: sae_weights.safetensors, and cfg.json, which says what they are.

    W_enc [d_in, d_sae]   b_enc [d_sae]   W_dec [d_sae, d_out]   b_dec [d_out]   threshold [d_sae] of jumprelu

Read are cfg.json of version 6, which has what is about the model in "metadata", and of the versions before, flat, also
with the names "hook_point" and "activation_fn_str" of the first ones. Refused by name is what an autoencoder artifact
does not compute: other architectures and activation functions, hooks that are no site, single heads, and inputs that
are normalised at run time. Folded in are "finetuning_scaling_factor", with the tensor scaling_factor, into the decoder,
and "rescale_acts_by_decoder_norm" of topk, into encoder and decoder. Written is version 6.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoder_spec import AutoencoderSpec, Function, autoencoder_spec
from patchclamp_server.artifacts.formats.base import Beside, CannotExpress, MalformedFile
from patchclamp_server.artifacts.formats.json_object import json_object
from patchclamp_server.artifacts.formats.safetensors import header_length, layout, parse_header, tensor_bytes
from patchclamp_server.artifacts.row_formats.base import Opened, RenamedRows, Source
from patchclamp_server.artifacts.row_formats.hook_names import hook_of_place, place_of_hook
from patchclamp_server.artifacts.tensor_file import TensorFile, blocks, open_tensor_file
from patchclamp_server.artifacts.types import ArtifactInfo
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import PUBLIC_SITES, Site

MAX_CONFIG_BYTES = 1 << 20
VERSION = "6.0.0"
NAMES = {
    "encoder": "W_enc",
    "encoder_bias": "b_enc",
    "decoder": "W_dec",
    "decoder_bias": "b_dec",
    "threshold": "threshold",
}
# Those of transcoders have a second hook.
_FUNCTIONS = {
    "standard": Function.RELU,
    "jumprelu": Function.JUMPRELU,
    "topk": Function.TOPK,
    "transcoder": Function.RELU,
    "jumprelu_transcoder": Function.JUMPRELU,
}
_SCALING = "scaling_factor"
# The first versions have these names.
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


@contextmanager
def open_saelens(path: Path, beside: Beside) -> Iterator[Opened]:
    """Opens sae_weights.safetensors; `beside.config` is cfg.json. Site and layer of `beside`, both given, take the
    place of the hook."""
    config = read_config(beside.config)
    spec = spec_of(config, beside)
    with open_tensor_file(path) as file:
        kept = {"format": "saelens", "method": "imported", **_texts(config, "model_name", "hook_name")}
        yield Opened(RenamedRows(file, _sources(file, config)), spec.site, kept | spec.provenance())


def read_config(text: str) -> dict[str, Any]:
    """Returns the entries of cfg.json, those of "metadata" among them. InvalidArgument on "config"."""
    if not text:
        raise InvalidArgument("config", "the content of cfg.json is missing, which says what the weights are")
    try:
        entries = json_object(text.encode(), "a configuration", '{"architecture": ...}', MAX_CONFIG_BYTES)
    except (MalformedFile, UnicodeEncodeError) as error:
        raise InvalidArgument("config", str(error)) from error
    metadata = entries.pop("metadata", None)
    flat = {**entries, **(metadata if isinstance(metadata, dict) else {})}
    return {_OLD_NAMES.get(name, name): value for name, value in flat.items()}


def spec_of(config: Mapping[str, Any], beside: Beside) -> AutoencoderSpec:
    """What the entries say. InvalidArgument on "config" names the entry that no autoencoder artifact computes."""
    architecture, k = config.get("architecture", "standard"), config.get("k")
    activation = config.get("activation_fn", "relu")
    if activation == "topk" and architecture == "standard":
        arguments = config.get("activation_fn_kwargs")
        architecture, k = "topk", arguments.get("k") if isinstance(arguments, dict) else None
    if not isinstance(architecture, str) or architecture not in _FUNCTIONS:
        _refuse("architecture", architecture, _FUNCTIONS)
    if activation not in ("relu", "topk"):
        _refuse("activation_fn", activation, ("relu", "topk"))
    if config.get("normalize_activations") not in (None, False, "none"):
        _refuse("normalize_activations", config["normalize_activations"], ("none",))
    if config.get("hook_head_index") is not None:
        _refuse("hook_head_index", config["hook_head_index"], (None,))
    if config.get("rescale_acts_by_decoder_norm") and architecture != "topk":
        _refuse("rescale_acts_by_decoder_norm", True, (False,))
    transcoder = architecture.endswith("transcoder")
    site, layer = _place(config, "hook_name", beside)
    said: dict[str, Any] = {
        "layer": layer,
        "function": _FUNCTIONS[architecture].value,
        "subtracted": "decoder_bias" if config.get("apply_b_dec_to_input", not transcoder) else "nothing",
    }
    if architecture == "topk":
        said["k"] = k
    if transcoder:
        output_site, output_layer = _place(config, "hook_name_out", Beside(sites=beside.sites))
        said |= {"output_site": output_site.value, "output_layer": output_layer}
    try:
        return autoencoder_spec(site, said)
    except InvalidArgument as error:
        raise InvalidArgument("config", f"{error.field.removeprefix('provenance.')}: {error.message}") from error


def write_saelens(info: ArtifactInfo, file: TensorFile, path: Path) -> str:
    """Writes sae_weights.safetensors and returns cfg.json. CannotExpress: there is no such architecture."""
    spec = autoencoder_spec(info.site, info.provenance)
    config = _config_of(spec, info, file)
    types = {}
    for name, shape in file.shapes.items():
        types[NAMES[name]] = file.dtypes[name], shape[::-1] if name == "encoder" else shape
    start, _ = layout({}, types)
    entries = parse_header(start[8 : 8 + header_length(start)]).entries
    with path.open("wb") as out:
        out.write(start)
        for name in file.shapes:
            first = len(start) + entries[NAMES[name]].start
            for row, block in blocks(file, name):
                size = block.dtype.itemsize
                if name != "encoder":
                    out.seek(first + row * size * block[0].numel())
                    out.write(tensor_bytes(block))
                    continue
                # A block of rows is a piece of each row of the transposed matrix.
                for column, piece in enumerate(block.T.contiguous()):
                    out.seek(first + (column * file.shapes[name][0] + row) * size)
                    out.write(tensor_bytes(piece))
    return json.dumps(config, indent=1)


def _config_of(spec: AutoencoderSpec, info: ArtifactInfo, file: TensorFile) -> dict[str, Any]:
    architecture = {Function.RELU: "standard", Function.TOPK: "topk"}.get(spec.function, "jumprelu")
    if spec.is_transcoder:
        if spec.function is Function.TOPK or spec.subtracts_decoder_bias:
            raise CannotExpress("SAELens has no transcoder of topk, nor one that subtracts decoder_bias from its input")
        architecture = "transcoder" if architecture == "standard" else "jumprelu_transcoder"
    n_features, width = file.shapes["encoder"]
    hook = hook_of_place(spec.site, spec.layer, PUBLIC_SITES)
    metadata = {"sae_lens_version": VERSION, "hook_name": hook, **_texts(info.provenance, "model_name")}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": n_features,
        "dtype": str(file.dtypes["encoder"]).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": spec.subtracts_decoder_bias,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if spec.site is Site.ATTN_Z else "none",
        "metadata": metadata,
    }
    if spec.function is Function.TOPK:
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": False}
    if spec.is_transcoder:
        config["d_out"] = file.shapes["decoder"][1]
        metadata["hook_name_out"] = hook_of_place(spec.output_site, spec.output_layer, PUBLIC_SITES)
    return config


def _sources(file: TensorFile, config: Mapping[str, Any]) -> dict[str, Source]:
    accepted = {*NAMES.values(), _SCALING}
    for name in file.shapes:
        if name not in accepted:
            raise MalformedFile(f"{name!r:.200} is not a tensor of SAELens that is read: {', '.join(sorted(accepted))}")
    sources = {ours: Source(theirs) for ours, theirs in NAMES.items() if theirs in file.shapes}
    for name in ("encoder", "decoder"):
        shape = file.shapes.get(NAMES[name], ())
        if len(shape) != 2 or min(shape) < 1:
            raise MalformedFile(f"{NAMES[name]} is missing, or no matrix")
    sources["encoder"] = Source("W_enc", transposed=True)
    if _SCALING in file.shapes:
        if file.shapes[_SCALING] != file.shapes["W_dec"][:1]:
            raise MalformedFile(f"scaling_factor has the shape {list(file.shapes[_SCALING])}; expected [d_sae]")
        scale = file.tensor(_SCALING).float()
        if not config.get("finetuning_scaling_factor") and bool((scale != 1.0).any()):
            raise MalformedFile("scaling_factor is not 1, but finetuning_scaling_factor of the configuration is false")
        sources["decoder"] = Source("W_dec", scale=scale)
    if config.get("rescale_acts_by_decoder_norm"):
        norms = _norms(file)
        sources["encoder"] = Source("W_enc", transposed=True, scale=norms)
        sources["encoder_bias"] = Source("b_enc", scale=norms)
        finetuned = sources["decoder"].scale
        sources["decoder"] = Source("W_dec", scale=1.0 / norms if finetuned is None else finetuned / norms)
    return sources


def _norms(file: TensorFile) -> Tensor:
    """Lengths float32 [d_sae] of the decoder rows; a row of zeros counts as one of length 1."""
    norms = torch.cat([block.float().norm(dim=1) for _, block in blocks(file, "W_dec")])
    return torch.where(norms > 0, norms, 1.0)


def _place(config: Mapping[str, Any], name: str, beside: Beside) -> tuple[Site, int]:
    if beside.site is not None and beside.layer is not None:
        return beside.site, beside.layer
    hook = config.get(name)
    if not isinstance(hook, str):
        raise InvalidArgument("config", f"{name} is missing, which says where the activations come from")
    try:
        return place_of_hook(hook, beside.sites)
    except ValueError as error:
        raise InvalidArgument("config", f"{name}: {error}; or give site and layer") from error


def _texts(entries: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: entries[name] for name in names if isinstance(entries.get(name), str)}


def _refuse(name: str, value: object, accepted: Collection[object]) -> None:
    listed = ", ".join(map(str, accepted))
    raise InvalidArgument("config", f"{name}: {value!r:.80} is not computed here; accepted: {listed}")
