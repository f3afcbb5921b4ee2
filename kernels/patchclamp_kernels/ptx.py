"""PTX and machine code tell of a compiled kernel how wide it loads, and what it takes of an SM."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

# ld.global.nc.L1::evict_last.L2::cache_hint.v4.b32, ld.relaxed.gpu.global.b32, …
_LOAD = re.compile(r"\bld(?:\.[\w:]+)*?\.global(?:\.[\w:]+)*?(?:\.v(?P<lanes>\d))?\.[busf](?P<bits>\d+)\s")
# cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
_ASYNC_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared(?:::cta)?\.global[\w.:]*\s*\[[^\]]*\]\s*,\s*\[[^\]]*\]\s*,\s*(?P<size>0x[0-9a-fA-F]+|\d+)"
)
# Of the kernel, and of each function that was not inlined into it.
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    registers: int  # a thread
    spill_store_bytes: int  # a thread, counted in instructions
    spill_load_bytes: int


def load_widths(ptx: str) -> dict[int, int]:
    """Counts each width in bytes among loads and asynchronous copies from global memory, widest first."""
    widths = Counter(int(m["lanes"] or 1) * int(m["bits"]) // 8 for m in _LOAD.finditer(ptx))
    widths.update(int(m["size"], 0) for m in _ASYNC_COPY.finditer(ptx))
    return dict(sorted(widths.items(), reverse=True))


def resources(ptx: str, cubin: bytes, capability: int, *, fused_multiply_add: bool = True) -> Resources:
    """Returns what a kernel takes of an SM. Raises CalledProcessError when a tool refuses its input."""
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
        registers, stack = zip(*(map(int, row) for row in _USAGE.findall(usage.stdout)), strict=True)
        # Registers are spilled to the stack: without one, nothing was, and assembling again is slow.
        fusion = [] if fused_multiply_add else ["--fmad=false"]
        stores, loads = _spills(ptx, capability, fusion, Path(directory)) if any(stack) else (0, 0)
    return Resources(max(registers), stores, loads)


def _spills(ptx: str, capability: int, options: list[str], directory: Path) -> tuple[int, int]:
    """Assembles with the ptxas and for the target that Triton takes, and reads its log."""
    source = directory / "kernel.ptx"
    source.write_text(ptx)
    target = f"--gpu-name={sm_arch_from_capability(capability)}"
    log = _run(get_ptxas(capability).path, "-v", *options, target, source, "-o", directory / "again.cubin").stderr
    found = [(int(stores), int(loads)) for stores, loads in _SPILLS.findall(log)]
    return sum(stores for stores, _ in found), sum(loads for _, loads in found)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)
