"""How much memory a process can have: what the machine has left, and what its control groups leave of their limits.

For a control group, at its own level and at each above:

    left = limit - usage + file pages, which the kernel gives back before it refuses

Limits are those of cgroup v2 (`memory.max`, `memory.high`) and v1 (`memory.limit_in_bytes`); see the kernel's
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. What the process has already is counted as available:
it is a part of every plan.
"""

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from patchclamp_server.sizes import shown_size

# cgroup v1 says in this way that there is no limit: the largest page-aligned int64, or a little less.
_UNLIMITED = 1 << 62
_FILE_PAGES = {"inactive_file", "active_file"}
_FILE_PAGES_V1 = {"total_inactive_file", "total_active_file"}


@dataclass(frozen=True)
class Available:
    """`source` says which of the limits is the nearest."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{shown_size(self.bytes)} are available ({self.source})"


def available_memory(device: str = "cpu", root: Path = Path("/")) -> Available:
    """Returns what this process can have of the memory of `device`. /proc and /sys are read below `root`."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return Available(free, f"free on {device}")
    found = [_of_machine(root), *_cgroups(root)]
    nearest = min(found, key=lambda each: each.bytes)
    return Available(max(0, nearest.bytes) + resident_memory(root), nearest.source)


def resident_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of memory that this process has, shared libraries among them; where the system does not say,
    the most that it had."""
    if (now := _fields(root / "proc/self/status").get("VmRSS")) is not None:
        return now * 1024
    # In KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_machine(root: Path) -> Available:
    """What the machine has left; where the system does not say (macOS, some sandboxes), all that it has."""
    if (left := _fields(root / "proc/meminfo").get("MemAvailable")) is not None:
        return Available(left * 1024, "MemAvailable")
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Available(installed - resident_memory(root), "physical memory")


def _cgroups(root: Path) -> Iterator[Available]:
    """What each group that this process is in leaves of its limit."""
    memberships = _text(root / "proc/self/cgroup") or ""
    for line in memberships.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            for group in _levels(root / "sys/fs/cgroup", path):
                yield from _left_v2(group)
        elif "memory" in controllers.split(","):
            for group in _levels(root / "sys/fs/cgroup/memory", path):
                yield from _left_v1(group)


def _levels(mount: Path, path: str) -> Iterator[Path]:
    """A group and those above it, as far as they are mounted: in a container its own group is the root."""
    relative = PurePosixPath(path.lstrip("/"))
    if ".." not in relative.parts:
        for level in (relative, *relative.parents):
            if (group := mount / level).is_dir():
                yield group


def _left_v2(group: Path) -> Iterator[Available]:
    usage = _number(group / "memory.current")
    files = _pages(group, _FILE_PAGES)
    for name in ("memory.max", "memory.high"):
        limit = _number(group / name)
        if limit is not None and usage is not None:
            yield Available(limit - usage + files, f"cgroup {name} is {shown_size(limit)}")


def _left_v1(group: Path) -> Iterator[Available]:
    limit, usage = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
    if limit is not None and usage is not None and limit < _UNLIMITED:
        files = _pages(group, _FILE_PAGES_V1)
        yield Available(limit - usage + files, f"cgroup memory.limit_in_bytes is {shown_size(limit)}")


def _pages(group: Path, names: set[str]) -> int:
    return sum(value for name, value in _fields(group / "memory.stat").items() if name in names)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says "max"."""
    text = _text(path)
    return int(text) if text is not None and text.strip().isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as `MemAvailable:  1234 kB`."""
    lines = (line.replace(":", " ").split() for line in (_text(path) or "").splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str | None:
    """The text of a file; None where there is none, or it may not be read: then it bounds nothing."""
    try:
        return path.read_text()
    except OSError:
        return None
