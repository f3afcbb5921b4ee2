"""Sparse autoencoders and transcoders: F features of one site and layer, from which an activation h [width] is made.

    encoder       [features, width]          floats; a row for each feature
    encoder_bias  [features]                 floats
    decoder       [features, output width]   floats; a row for each feature
    decoder_bias  [output width]             floats
    threshold     [features]                 floats; of jumprelu and batchtopk

    p = (h - s) . encoder^T + encoder_bias      s is the decoder_bias, or 0 where nothing is subtracted
    f = p where p > threshold and p > 0, else 0              relu (threshold 0), jumprelu, batchtopk
    f = p where p is among the k largest and p > 0, else 0   topk; all that are as large as the k-th are among them
    reconstruction = f . decoder + decoder_bias

The site that is read is that of the artifact. `provenance` says the rest: "layer", "function", "k" of topk,
"subtracted" ("decoder_bias" or "nothing"), and of a transcoder, which reconstructs another activation than it reads,
"output_site" and "output_layer".

Rajamanoharan et al. 2024 (JumpReLU), Gao et al. 2024 (TopK), Bussmann et al. 2024 (BatchTopK), Dunefsky et al. 2024
(transcoders).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site

REQUIRED = ("encoder", "encoder_bias", "decoder", "decoder_bias")
TENSORS = (*REQUIRED, "threshold")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_FEATURES, MAX_WIDTH, MAX_LAYER = 1 << 22, 1 << 20, 999_999
SUBTRACTED = {"decoder_bias": True, "nothing": False}
_SITES = {site.value: site for site in PUBLIC_SITES}


class Function(Enum):
    """The activation function. The value is the name used in provenance and messages."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    TOPK = "topk"
    BATCHTOPK = "batchtopk"


WITH_THRESHOLD = (Function.JUMPRELU, Function.BATCHTOPK)


@dataclass(frozen=True)
class AutoencoderSpec:
    """What provenance says. `k`: of topk, else 0. The output is the site and layer that are reconstructed."""

    site: Site
    layer: int
    function: Function
    k: int
    subtracts_decoder_bias: bool
    output_site: Site
    output_layer: int

    @property
    def is_transcoder(self) -> bool:
        return (self.output_site, self.output_layer) != (self.site, self.layer)

    def provenance(self) -> dict[str, Any]:
        """Returns what is stored of it beside the site."""
        found: dict[str, Any] = {
            "layer": self.layer,
            "function": self.function.value,
            "subtracted": "decoder_bias" if self.subtracts_decoder_bias else "nothing",
        }
        if self.k:
            found["k"] = self.k
        if self.is_transcoder:
            found |= {"output_site": self.output_site.value, "output_layer": self.output_layer}
        return found


def autoencoder_spec(site: Site | None, provenance: Mapping[str, Any]) -> AutoencoderSpec:
    """Reads provenance. InvalidArgument on "site" or "provenance.<name>"."""
    if site is None:
        raise InvalidArgument("site", "an autoencoder needs the site that it reads")
    layer = _integer(provenance, "layer", 0, MAX_LAYER)
    function = Function(_word(provenance, "function", [f.value for f in Function]))
    subtracted = SUBTRACTED[_word(provenance, "subtracted", list(SUBTRACTED))]
    k = _integer(provenance, "k", 1, MAX_FEATURES) if function is Function.TOPK else 0
    output_site, output_layer = site, layer
    if "output_site" in provenance or "output_layer" in provenance:
        output_site = _SITES[_word(provenance, "output_site", list(_SITES))]
        output_layer = _integer(provenance, "output_layer", 0, MAX_LAYER)
    return AutoencoderSpec(site, layer, function, k, subtracted, output_site, output_layer)


def check_autoencoder(
    site: Site | None, provenance: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> AutoencoderSpec:
    """Provenance and tensors of accepted shapes fit each other. InvalidArgument on "site", "provenance.<name>" or
    "tensors"."""
    spec = autoencoder_spec(site, provenance)
    if (spec.function in WITH_THRESHOLD) != ("threshold" in shapes):
        verb = "needs" if spec.function in WITH_THRESHOLD else "has no"
        raise InvalidArgument("tensors", f"{spec.function.value} {verb} threshold")
    n_features, width = shapes["encoder"]
    output_width = shapes["decoder"][1]
    if spec.k > n_features:
        raise InvalidArgument("provenance.k", f"{spec.k} of {n_features} features")
    if width != output_width and not spec.is_transcoder:
        message = f"encoder reads width {width} and decoder writes {output_width}; the two sites of a transcoder are "
        raise InvalidArgument("tensors", message + "named by provenance.output_site and .output_layer")
    if width != output_width and spec.subtracts_decoder_bias:
        message = f"decoder_bias has the width {output_width}, and cannot be subtracted from an input of {width}"
        raise InvalidArgument("provenance.subtracted", message)
    return spec


def check_place(model: ModelInfo, spec: AutoencoderSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The model has the sites and layers, of these widths. InvalidArgument on "site", "provenance.<name>" or
    "tensors"."""
    places = [("", "site", spec.site, spec.layer, "encoder")]
    if spec.is_transcoder:
        places.append(("output_", "provenance.output_site", spec.output_site, spec.output_layer, "decoder"))
    for prefix, path, site, layer, name in places:
        if site not in model.sites:
            has = ", ".join(known.value for known in model.sites)
            raise InvalidArgument(path, f"{model.name} has no {site.value}; it has {has}")
        if layer >= model.n_layers:
            message = f"layer {layer}; {model.name} has layers 0 to {model.n_layers - 1}"
            raise InvalidArgument(f"provenance.{prefix}layer", message)
        if shapes[name][1] != model.sites[site]:
            width = model.sites[site]
            message = f"{name} has width {shapes[name][1]}; {site.value} of {model.name} has width {width}"
            raise InvalidArgument("tensors", message)


def autoencoder_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """None: the layer is in provenance. InvalidArgument: names and shapes that an autoencoder does not have."""
    for name in REQUIRED:
        if name not in shapes:
            raise InvalidArgument("tensors", f"an autoencoder needs {name}")
    for name in shapes:
        if name not in TENSORS:
            accepted = ", ".join(TENSORS)
            raise InvalidArgument("tensors", f"{name!r:.200} is not a tensor of an autoencoder; accepted: {accepted}")
    for name in ("encoder", "decoder"):
        shape = shapes[name]
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_FEATURES or not 1 <= shape[1] <= MAX_WIDTH:
            message = f"{name} must be [features, width], at most [{MAX_FEATURES}, {MAX_WIDTH}], not {list(shape)}"
            raise InvalidArgument("tensors", message)
    n_features, output_width = shapes["encoder"][0], shapes["decoder"][1]
    sizes = {
        "decoder": (n_features, output_width),
        "encoder_bias": (n_features,),
        "decoder_bias": (output_width,),
        "threshold": (n_features,),
    }
    for name, size in sizes.items():
        if name in shapes and tuple(shapes[name]) != size:
            message = f"{name} must be {list(size)}, as encoder has {n_features} features, not {list(shapes[name])}"
            raise InvalidArgument("tensors", message)
    return ()


def check_autoencoder_tensors(tensors: Mapping[str, Tensor]) -> None:
    """InvalidArgument: a tensor is not of floats, or holds NaN or Inf."""
    for name, tensor in tensors.items():
        check_block(name, tensor)


def check_block(name: str, block: Tensor) -> None:
    """Checks some rows of a tensor. InvalidArgument as check_autoencoder_tensors."""
    if block.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        found = str(block.dtype).removeprefix("torch.")
        raise InvalidArgument("tensors", f"{name} must be {accepted}, not {found}")
    if not bool(torch.isfinite(block).all()):
        raise InvalidArgument("tensors", f"{name} holds NaN or Inf")


def _integer(provenance: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = provenance.get(name)
    # Numbers of a protobuf Struct are doubles.
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or not low <= value <= high:
        raise InvalidArgument(f"provenance.{name}", f"must be a whole number in {low} to {high}, not {value!r:.40}")
    return int(value)


def _word(provenance: Mapping[str, Any], name: str, accepted: Sequence[str]) -> str:
    value = provenance.get(name)
    if not isinstance(value, str) or value not in accepted:
        raise InvalidArgument(f"provenance.{name}", f"{value!r:.80} is none of: {', '.join(accepted)}")
    return value
