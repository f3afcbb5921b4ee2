"""When a server is ready, what only its start needed is given back, and nothing that was written."""

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from patchclamp_server.engine.memory.available import resident_memory
from patchclamp_server.engine.memory.start_memory import clean_code, give_back_start_memory

SMAPS = """\
1000-3000 r-xp 00000000 fe:00 11 /usr/lib/libone.so.1
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
3000-5000 r--p 00002000 fe:00 11 /usr/lib/libone.so.1
Rss:                   8 kB
Anonymous:             4 kB
5000-6000 rw-p 00004000 fe:00 11 /usr/lib/libone.so.1
Rss:                   4 kB
Anonymous:             0 kB
7000-9000 r--s 00000000 fe:00 12 /models/weights.gguf
Rss:                   8 kB
Anonymous:             0 kB
a000-b000 r--p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
c000-d000 r--p 00000000 fe:00 13 /a directory/two.so
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
d000-e000 r--p 00000000 fe:00 14 /usr/lib/libthree.so
Rss:                   0 kB
Anonymous:             0 kB
Swap:                  4 kB
SwapPss:               4 kB
e000-f000 r--p 00000000 fe:00 15 /usr/lib/libuncounted.so
Rss:                   0 kB
"""


def test_only_pages_of_libraries_that_nobody_wrote_to_are_given_back() -> None:
    assert list(clean_code(SMAPS)) == [(0x1000, 0x3000), (0xC000, 0xD000)]


def test_the_process_goes_on_with_less_memory() -> None:
    x = torch.ones(64, 64)
    before = x @ x
    held = resident_memory()
    give_back_start_memory()
    assert resident_memory() < held - (16 << 20)
    assert torch.equal(x @ x, before)
    assert np.linalg.norm(before.numpy()) == 64 * 64


def test_the_maps_of_this_process_are_read() -> None:
    maps = Path("/proc/self/smaps").read_text()
    assert sum(end - start for start, end in clean_code(maps)) > 1 << 20


def test_a_server_starts_where_its_maps_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: object, **__: object) -> str:
        asked.append("smaps")
        raise PermissionError(13, "Permission denied", "/proc/self/smaps")

    monkeypatch.setattr(Path, "read_text", refuse)
    give_back_start_memory()
    assert asked == ["smaps"]


def test_a_library_may_have_a_name_of_any_bytes(tmp_path: Path) -> None:
    source = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)
    named = os.fsencode(tmp_path) + b"/lib\xff\x85\r.so"
    shutil.copy(os.fsencode(source), named)
    with open(named, "rb") as file, mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ) as own:
        mapped = own[:4096]
        give_back_start_memory()
        assert own[:4096] == mapped
