"""Autoencoders for tests: features of a tiny model's activation that fire about half of the time."""

import torch
from engine_runs import loaded
from programs import numbers, shapes

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.sites import Site

N_FEATURES = 40


def put_autoencoder(
    store: ArtifactStore,
    family: str,
    site: Site,
    layer: int,
    function: str = "relu",
    *,
    seed: str = "",
    n_features: int = N_FEATURES,
    subtracted: str = "decoder_bias",
    output: tuple[Site, int] | None = None,
    model_fingerprint: str | None = None,
) -> str:
    """Returns the id of a new autoencoder, or with an output of a transcoder."""
    seed, width = f"{family} {site.value} {layer} {seed}", shapes(family).sites[site]
    written = width if output is None else shapes(family).sites[output[0]]
    tensors = {
        "encoder": numbers(seed + "E", n_features, width) / width**0.5,
        "encoder_bias": 0.3 * numbers(seed + "b", n_features),
        "decoder": numbers(seed + "D", n_features, written) / written**0.5,
        "decoder_bias": 0.2 * numbers(seed + "s", written),
    }
    said: dict[str, object] = {"layer": layer, "function": function, "subtracted": subtracted}
    if function in ("jumprelu", "batchtopk"):
        # A few are negative, which is none.
        tensors["threshold"] = 0.3 * numbers(seed + "t", n_features) + 0.2
    if function == "topk":
        said["k"] = 5
    if output is not None:
        said |= {"subtracted": "nothing", "output_site": output[0].value, "output_layer": output[1]}
    info = store.put(
        ArtifactKind.AUTOENCODER,
        tensors,
        model_fingerprint=loaded(family).info.fingerprint if model_fingerprint is None else model_fingerprint,
        site=site,
        provenance=said,
    )
    return info.id


def orthonormal(store: ArtifactStore, family: str, site: Site, layer: int, n_features: int) -> str:
    """An autoencoder whose encoder is its decoder, of orthonormal rows, and without biases: f = max(0, h · D_i)."""
    width = shapes(family).sites[site]
    rows = torch.linalg.qr(numbers("orthonormal", width, n_features)).Q.T.contiguous()
    tensors = {
        "encoder": rows,
        "encoder_bias": torch.zeros(n_features),
        "decoder": rows.clone(),
        "decoder_bias": torch.zeros(width),
    }
    info = store.put(
        ArtifactKind.AUTOENCODER,
        tensors,
        model_fingerprint=loaded(family).info.fingerprint,
        site=site,
        provenance={"layer": layer, "function": "relu", "subtracted": "nothing"},
    )
    return info.id
