"""Part 1: what the device is, and the two rates that bound everything else."""

import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu.bootstrap import ROOT
from gpu.setting import Setting
from gpu.timing import Timer


def environment(setting: Setting) -> dict[str, object]:
    device = "cpu"
    details: dict[str, object] = {}
    if setting.cuda:
        properties = torch.cuda.get_device_properties(setting.device)
        device = torch.cuda.get_device_name(setting.device)
        details = {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "device": device,
        **details,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": setting.commit or _commit(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "numpy")},
    }


def ceilings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    """Device-to-device copy, bytes read and written; a matrix product of random bfloat16."""
    yield "environment", environment(setting)
    timer = Timer(setting)
    device = torch.device(setting.device)
    n = setting.pick(2**31, 2**31, 2**20)
    source = torch.randint(-128, 127, (n,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = timer.one([lambda: target.copy_(source)])
    source = target = None
    size = setting.pick(8192, 8192, 128)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = timer.one([lambda: torch.mm(a, b, out=out)])
    yield (
        "ceilings",
        {
            "copy_bytes_per_second": 2 * n / copy.seconds,
            "copy_spread": round(copy.spread, 4),
            "flops_per_second": 2 * size**3 / product.seconds,
            "flops_spread": round(product.spread, 4),
            "matrix": size,
            "copied_bytes": n,
        },
    )


def _commit() -> str:
    """With a plus where the working tree holds changes; "unknown" in a copy without its history."""
    try:
        head, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except OSError:
        return "unknown"
    return head + ("+" if changes else "") if head else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
