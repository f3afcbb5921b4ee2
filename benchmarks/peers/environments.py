"""Virtual environments of the peers, made once in a cache directory: one each, since they want different versions.

torch's own requirement is pinned in all that have it, so that the build which pip's index and links say is taken. A
build for a CPU needs 1.2 to 1.6 GB an environment; llama.cpp is compiled for this machine's processor, some minutes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
OURS = "patchclamp"
LLAMA = "llama.cpp"
# By the name of a peer, what is installed. The order is that of tables.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    LLAMA: ("llama-cpp-python==0.3.36",),
    "transformers": (TORCH, "transformers==5.23.0"),
    "steering-vectors": (TORCH, "steering-vectors==0.12.2", "transformers==4.57.6"),
    "repeng": (TORCH, "repeng==0.4.0", "transformers==5.24.0"),
    "nnsight": (TORCH, "nnsight==0.8.1", "transformers==5.23.0"),
    "transformer-lens": (TORCH, "transformer-lens==4.3.0", "transformers==5.9.0"),
}
PEERS = (OURS, *REQUIREMENTS)
WORKER_OF = {name: f"{name.replace('.', '_').replace('-', '_')}_worker.py" for name in PEERS}
# Written last: what the environment was made of.
STAMP = "installed.json"


class NotInstalled(Exception):
    """What pip said."""


def interpreter(cache: Path, peer: str) -> Path:
    """The Python of a peer's environment, which is made where it is not there, or of other versions.

    Raises NotInstalled.
    """
    directory, wanted = cache / peer, list(REQUIREMENTS[peer])
    stamp, python = directory / STAMP, directory / "bin" / "python"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    print(f"installing {peer}: {' '.join(wanted)}", flush=True)
    _run([sys.executable, "-m", "venv", str(directory)])
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", *wanted])
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
        raise NotInstalled("\n".join(said)[-1500:] or f"status {done.returncode}")
