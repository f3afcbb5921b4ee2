"""This module turns what a user names into local files: a directory of safetensors, or those of a GGUF model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from patchclamp_server.model import embedded
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.files import files_of
from patchclamp_server.model.progress import Progress, Silent, Stage

EMBEDDED = "embedded"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
ACCEPTED = '"embedded", a hub id such as org/name, a directory with safetensors, or a path to a .gguf file'

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# These are the files of a hub repository that loading reads; none of them can run code.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
]
HUB_IGNORED = ["*/*", *PICKLES, "*.py"]


@dataclass(frozen=True)
class ModelSource:
    """`path` is a directory with config, tokenizer and safetensors, or the first of `gguf_files`; `name` is what to
    call the model."""

    name: str
    path: Path
    gguf_files: tuple[Path, ...] = ()


def resolve(ref: str, progress: Progress | None = None) -> ModelSource:
    """Finds or downloads the model `ref`, which is one of ACCEPTED.

    Raises ModelSourceError for an unknown name, a missing network, or weights that are not safetensors.
    """
    path = Path(ref).expanduser()
    if ref == EMBEDDED:
        file = embedded.embedded_file(progress)
        return ModelSource(embedded.NAME, file, (file,))
    if not ref:
        raise ModelSourceError(f"no model is named; a model is {ACCEPTED}")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelSourceError(f"{ref} is a file that is not .gguf; a model is {ACCEPTED}")
        name, files = files_of(path)
        return ModelSource(name, files[0], files)
    if path.is_dir():
        source = ModelSource(path.resolve().name, path)
    elif path.suffix.lower() == ".gguf" or not HUB_ID.fullmatch(ref):
        raise ModelSourceError(f"{ref} does not exist; a model is {ACCEPTED}")
    else:
        source = ModelSource(ref, _from_hub(ref, progress or Silent()))
    weight_files(source.path)
    return source


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of the model: ``model.safetensors``, or every shard of its index.

    Raises ModelSourceError when there are none, or one is missing. Pickled weights are never an alternative: they can
    run code.
    """
    if not (directory / "config.json").is_file():
        hint = "; name the .gguf file itself" if any(p.suffix.lower() == ".gguf" for p in directory.iterdir()) else ""
        raise ModelSourceError(f"{directory} has no config.json, so it holds no model{hint}")
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        return _shards(directory)
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelSourceError(
            f"{directory} has only pickled weights ({', '.join(pickles)}), which can run code and are not loaded; "
            f"convert them to safetensors with save_pretrained"
        )
    raise ModelSourceError(f"{directory} has neither {WEIGHTS} nor {INDEX}")


def _shards(directory: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelSourceError(f"{directory / INDEX} has no weight_map") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelSourceError(f"{directory / INDEX} names {name!r}, which is not a safetensors file beside it")
        if not (directory / name).is_file():
            raise ModelSourceError(f"{directory} lacks {name}, which its index names")
    return [directory / name for name in names]


def _from_hub(ref: str, progress: Progress) -> Path:
    progress.update(Stage.DOWNLOAD)
    try:
        directory = Path(snapshot_download(ref, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"{ref} is not in the local hub cache and the hub cannot be reached ({error}); a model is {ACCEPTED}"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelSourceError(f"{ref} cannot be downloaded from the hub: {error}") from error
    if not any(directory.glob("*.safetensors")):
        # Pickled weights were not even downloaded.
        raise ModelSourceError(
            f"{ref} has no safetensors weights on the hub; pickled weights can run code and are not loaded"
        )
    return directory
