"""A user without a home directory, as in containers, has no cache: what need not be there is done without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchclamp_server.cli.commands import main
from patchclamp_server.files import cache_root
from patchclamp_server.model.cache import CacheUnwritable, cached_model
from patchclamp_server.model.digests import sha256_of_file
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.gguf.tokenizer import gguf_tokenizer
from patchclamp_server.model.progress import Silent

SOME_USER = 54321


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "PATCHCLAMP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # The system has no entry for such a user.
    monkeypatch.setattr(os, "getuid", lambda: SOME_USER)


def test_the_cache_is_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="this user has no home directory, and PATCHCLAMP_CACHE names none"):
        cache_root()
    with pytest.raises(CacheUnwritable, match=r"there is no cache: .*PATCHCLAMP_CACHE names none"):
        cached_model("key", lambda directory: None, Silent())
    (tmp_path / "file").write_bytes(b"")
    assert sha256_of_file(tmp_path / "file").startswith("e3b0c442")


def test_the_tokenizer_of_a_gguf_file_is_made_at_every_start(tiny_gguf: Path) -> None:
    assert gguf_tokenizer(read_header(tiny_gguf), Silent()).eos_token == "<|im_end|>"


def test_compiled_code_lives_as_long_as_the_process() -> None:
    program = (
        f"import os; os.getuid = lambda: {SOME_USER}\n"
        "from patchclamp_server.cpu.compiled_code import keep_compiled_code; keep_compiled_code();"
        "print(os.environ['NUMBA_CACHE_DIR'], os.path.isdir(os.environ['NUMBA_CACHE_DIR']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    directory, there = done.stdout.split()
    assert there == "True"
    assert not Path(directory).exists()


def test_a_server_says_what_it_needs_to_be_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert main(["--address", "127.0.0.1:0"]) == 1
    error = "this user has no home directory, and --artifacts-url names none"
    assert error in capsys.readouterr().err
