"""Files of sparse autoencoders: what is sent with them, and what comes back.

from patchclamp.autoencoders import autoencoder_file

path, options = autoencoder_file("layer_14/")  # sae_weights.safetensors and cfg.json of SAELens, or params.npz
client.put_artifact(path, **options, tags=["sae"])
"""

import os
from dataclasses import dataclass
from pathlib import Path

from patchclamp.fields import shown
from patchclamp.names import SiteName
from patchclamp.requests.artifacts import UploadOptions

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def autoencoder_file(
    path: str | Path, *, site: SiteName | None = None, layer: int | None = None
) -> tuple[Path, UploadOptions]:
    """Returns the file of an autoencoder, and the options of put_artifact that say what it is.

    path: a directory of SAELens, its sae_weights.safetensors with cfg.json beside it, or params.npz of Gemma Scope.
    site, layer: where it reads, which params.npz does not say; else they take the place of the hook of cfg.json.
    Raises ValueError where there is no such file, and OSError where it cannot be read.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path: expected a path, got {shown(path)}")
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS if (file / WEIGHTS).exists() else file / "params.npz"
    if not file.is_file():
        raise ValueError(f"path: expected a file, or a directory with {WEIGHTS} or params.npz, got {path}")
    options: UploadOptions = {"kind": "autoencoder", "site": site, "layer": layer}
    if file.suffix == ".npz":
        return file, {**options, "format": "gemma_scope_npz"}
    beside = file.with_name(CONFIG)
    if not beside.is_file():
        raise ValueError(f"path: expected {CONFIG} beside {file}, which says what the weights are")
    return file, {**options, "format": "saelens", "config": beside.read_text(encoding="utf-8")}


@dataclass(frozen=True)
class ExportedAutoencoder:
    """Holds the two files of SAELens: sae_weights.safetensors and cfg.json."""

    weights: bytes
    config: str

    def save(self, directory: str | Path) -> Path:
        """Writes both files into a directory, which is made where it is missing, and returns it."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: files that were there stay when the disk is full.
        parts = {name: target / f"{name}.{os.getpid()}.part" for name in (WEIGHTS, CONFIG)}
        try:
            parts[WEIGHTS].write_bytes(self.weights)
            parts[CONFIG].write_text(self.config, encoding="utf-8")
            for name, part in parts.items():
                part.replace(target / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        return target
