"""Trained interventions that others keep as files of PyTorch, as artifacts and back.

from patchclamp.torch_files import read_loreft

file = read_loreft("my_reft")  # a directory of pyreft
client.put_artifact(file.data, kind=file.kind, site=file.site, provenance=file.provenance, tags=["my_reft"])
client.generate("…", program=[low_rank("my_reft", layers=file.layers, scope=last(1))])

Files are read with `weights_only`, so that none of their code runs. PyTorch and safetensors must be installed here; the
server reads safetensors alone.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchclamp.extras import install_line
from patchclamp.names import ArtifactKindName, SiteName

# Components of pyvene by the site that they are; a module's path stands for the first or second of them.
_COMPONENTS: Mapping[str, SiteName] = {
    "block_output": "resid_post",
    "block_input": "resid_pre",
    "mlp_output": "mlp_out",
    "attention_output": "attn_out",
}
_COMPONENT_NAMES = {site: component for component, site in _COMPONENTS.items()}
_KEY = re.compile(r"intkey_layer[._](\d+)[._](?:comp|repr)[._](.+?)[._]unit[._].*\.bin")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)[\[.](\d+)\]?\.output")


@dataclass(frozen=True)
class TorchFile:
    """What put_artifact takes: `data` is a safetensors file of an artifact of this kind, site and these layers."""

    data: bytes
    kind: ArtifactKindName
    site: SiteName
    layers: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


def read_loreft(directory: str | Path) -> TorchFile:
    """Reads the interventions LoReFT(h) = h + Rᵀ(Wh + b - Rh) that pyreft saved into a directory, as a subspace.

    Each layer is a file intkey_layer.<l>.comp.<component>.unit.….bin with `weight` W [rank, width], `bias` b [rank] and
    `rotate_layer` Rᵀ [width, rank]. Which tokens were edited is in no file: the edit's scope says it. An activation
    function other than the identity is in none either.

    Raises ValueError, with the name of the file, for another kind of intervention, for two of one layer and for two
    components, since an artifact has one site.
    """
    torch = _torch()
    path = Path(directory)
    files = sorted(path.glob("intkey_*.bin"))
    if not files:
        raise ValueError(f"{path}: no file is called intkey_*.bin; expected a directory that pyreft saved")
    tensors: dict[str, Any] = {}
    sites: dict[SiteName, Path] = {}
    for file in files:
        layer, site = _place(file)
        sites.setdefault(site, file)
        if len(sites) > 1:
            raise ValueError(f"{file}: {site}, but {next(iter(sites.values()))} is at {next(iter(sites))}")
        found = _load(torch, file)
        if not isinstance(found, dict) or set(found) != {"weight", "bias", "rotate_layer"}:
            names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{file}: expected weight, bias and rotate_layer of LoReFT, found {names}")
        if f"layer.{layer}.rotation" in tensors:
            raise ValueError(f"{file}: layer {layer} has two interventions; an artifact has one for each layer")
        tensors[f"layer.{layer}.rotation"] = found["rotate_layer"].T
        tensors[f"layer.{layer}.weight"] = found["weight"]
        tensors[f"layer.{layer}.bias"] = found["bias"]
    [site] = sites
    return _file(torch, tensors, "subspace", site, {"method": "imported", "format": "pyreft", "files": len(files)})


def write_loreft(
    data: bytes, directory: str | Path, *, site: SiteName = "resid_post", strength: float = 1.0
) -> tuple[Path, ...]:
    """Writes a downloaded artifact as pyreft names its files, and returns these. The directory is made if need be.

    data: in the format safetensors, a subspace with weight and bias, or what LoReFT can compute as well: a vector v,
    which becomes h + strength · v (R = v/‖v‖, W = R, b = strength · ‖v‖), and an affine map A h + b, which takes the
    whole width (R = I, W = A). pyreft's config.json is not written: it describes a model.

    Raises ValueError for a subspace without weight and bias, for a vector of zeros, for a strength of what is no vector
    (it interpolates between h and the result, which no file can say), and for a site that pyreft does not name.
    """
    torch = _torch()
    from safetensors.torch import load

    if site not in _COMPONENT_NAMES:
        raise ValueError(f"pyreft has no name for {site}; accepted: {', '.join(_COMPONENT_NAMES)}")
    tensors = load(data)
    layers = sorted({int(name.split(".")[1]) for name in tensors})
    states = {layer: _loreft(torch, tensors, layer, strength) for layer in layers}
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    written = []
    for layer, (rotation, weight, bias) in states.items():
        file = path / f"intkey_layer.{layer}.comp.{_COMPONENT_NAMES[site]}.unit.pos.nunit.1#0.bin"
        torch.save({"weight": weight, "bias": bias, "rotate_layer": rotation.T.contiguous()}, file)
        written.append(file)
    return tuple(written)


def _loreft(torch: Any, tensors: Mapping[str, Any], layer: int, strength: float) -> tuple[Any, Any, Any]:
    """Returns R [rank, width], W [rank, width] and b [rank] of a layer, in float32 but for those that are kept."""
    own = {name.removeprefix(f"layer.{layer}").lstrip("."): tensors[name] for name in _of_layer(tensors, layer)}
    if (vector := own.get("")) is not None:
        norm = vector.float().norm()
        if not norm > 0:
            raise ValueError(f"layer {layer} is a vector of zeros, which has no direction")
        rotation = (vector.float() / norm)[None]
        return rotation, rotation.clone(), strength * norm[None]
    if strength != 1.0:
        raise ValueError(f"strength is of vectors; layer {layer} has {', '.join(own)}")
    if "matrix" in own or "left" in own:
        matrix = own["matrix"].float() if "matrix" in own else own["left"].float() @ own["right"].float().T
        return torch.eye(len(matrix)), matrix, own.get("bias", torch.zeros(len(matrix))).float()
    if "weight" not in own:
        raise ValueError(f"layer {layer} has no weight and bias: a file of LoReFT cannot hold a bare subspace")
    return own["rotation"], own["weight"], own["bias"]


def _of_layer(tensors: Mapping[str, Any], layer: int) -> list[str]:
    return [name for name in tensors if int(name.split(".")[1]) == layer]


def read_lm_steer(
    path: str | Path, *, layer: int, epsilon: float, values: "tuple[float, ...]" = (1.0,), site: SiteName = "resid_post"
) -> TorchFile:
    """Reads a checkpoint of LM-Steer, h + ε Σ_i v_i P2_i P1_iᵀ h, as an affine map of one layer and site.

    The checkpoint has `projector1` and `projector2` [steers, width, rank]; `values` has v, one for each steer, and
    `epsilon` is the one that it was trained with: it is in the arguments of training, not among the weights.
    LM-Steer trains after the final norm, where no edit is made here: at resid_post of the last layer the map acts
    before that norm, and the result is what the norm makes of it.
    """
    torch = _torch()
    found = _state(_load(torch, Path(path)), path)
    first, second = (_named(found, name, path) for name in ("projector1", "projector2"))
    if first.dim() != 3 or first.shape != second.shape:
        raise ValueError(f"{path}: projector1 {list(first.shape)} and projector2 {list(second.shape)} are no pair")
    if len(values) != len(first):
        raise ValueError(f"values has {len(values)} numbers; {path} has {len(first)} steers")
    width = first.shape[1]
    change = sum(value * b.double() @ a.double().T for value, a, b in zip(values, first, second, strict=True))
    matrix = torch.eye(width, dtype=torch.float64) + epsilon * change
    said = {"method": "imported", "format": "lm_steer", "epsilon": epsilon, "values": list(values)}
    return _file(torch, {f"layer.{layer}.matrix": matrix}, "affine_map", site, said)


def read_affine(
    path: str | Path, *, layer: int, matrix: str = "weight", bias: str = "bias", site: SiteName = "resid_post"
) -> TorchFile:
    """Reads the state of a torch.nn.Linear, h → A h + b, as an affine map of one layer and site.

    matrix, bias: what they are called in the file; without the second, b is 0.
    """
    torch = _torch()
    found = _state(_load(torch, Path(path)), path)
    tensors = {f"layer.{layer}.matrix": _named(found, matrix, path)}
    if any(name == bias or name.endswith(f".{bias}") for name in found):
        tensors[f"layer.{layer}.bias"] = _named(found, bias, path)
    return _file(torch, tensors, "affine_map", site, {"method": "imported", "format": "torch"})


def _file(
    torch: Any, tensors: Mapping[str, Any], kind: ArtifactKindName, site: SiteName, provenance: Mapping[str, Any]
) -> TorchFile:
    from safetensors.torch import save

    data: bytes = save({name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()})
    layers = tuple(sorted({int(name.split(".")[1]) for name in tensors}))
    return TorchFile(data, kind, site, layers, provenance)


def _place(file: Path) -> tuple[int, SiteName]:
    match = _KEY.fullmatch(file.name)
    if match is not None and match[2] in _COMPONENTS:
        return int(match[1]), _COMPONENTS[match[2]]
    module = None if match is None else _MODULE.fullmatch(match[2])
    if module is not None:
        return int(module[1]), "resid_post"
    accepted = ", ".join(_COMPONENTS)
    raise ValueError(f"{file}: expected intkey_layer.<l>.comp.<component>.unit.….bin with one of {accepted}")


def _load(torch: Any, file: Path) -> Any:
    # Checkpoints of LM-Steer carry their arguments, which are no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _state(found: Any, path: str | Path) -> Mapping[str, Any]:
    """Returns the state, which may stand in a list beside the arguments of training."""
    candidates = found if isinstance(found, list | tuple) else [found]
    for each in candidates:
        if isinstance(each, dict) and each and all(isinstance(name, str) for name in each):
            return each
    raise ValueError(f"{path}: expected tensors by name, found {type(found).__name__}")


def _named(state: Mapping[str, Any], name: str, path: str | Path) -> Any:
    named = [tensor for key, tensor in state.items() if key == name or key.endswith(f".{name}")]
    if len(named) != 1:
        raise ValueError(f"{path}: {len(named)} tensors are called {name}; there are {', '.join(state)}")
    return named[0]


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"reading files of PyTorch needs torch and safetensors: {install_line('server')}"
        raise ModuleNotFoundError(message) from error
    return torch
