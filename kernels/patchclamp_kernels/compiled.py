"""This compiles every kernel variant in use ahead of time, without a GPU, and shows what would make it slow.

    python -m patchclamp_kernels.compiled [--op NAME …] [--sm 80 90] [--json FILE]

prints a table and exits with 1 when a variant does not compile, spills registers, needs more shared memory than a block
gets, or never loads `vector_bytes` at once. Triton keeps what it compiled in its own cache, so a second run is quick.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from patchclamp_kernels import ops, ptx
from patchclamp_kernels.cases import CompileCase
from patchclamp_kernels.runtime import INTERPRETED

# Shared memory that one block may take, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
CAPABILITIES = (80, 90)
PROCESSES = 2


@dataclass(frozen=True)
class Report:
    """Reports one variant compiled for one capability. `error` says why there are no numbers."""

    op: str
    case: str
    capability: int
    wanted_load_bytes: int
    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # how many instructions by width in bytes, widest first
    error: str = ""

    @property
    def widest_load_bytes(self) -> int:
        return max(self.loads, default=0)

    def problems(self) -> list[str]:
        """Returns the problems in words; none when the variant is fit to be served."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(f"spills: {self.spill_store_bytes} bytes stored, {self.spill_load_bytes} loaded")
        if self.widest_load_bytes < self.wanted_load_bytes:
            found.append(f"loads at most {self.widest_load_bytes} bytes at once, not {self.wanted_load_bytes}")
        if self.shared_bytes > SHARED_LIMIT[self.capability]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory of {SHARED_LIMIT[self.capability]}")
        return found


def compile_case(op: str, case: CompileCase, capability: int) -> Report:
    """Compiles one case. Raises RuntimeError in the interpreter, where there is nothing to compile, and ValueError for
    a case that does not describe its kernel's arguments."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 makes interpreted kernels: unset it to compile ahead of time")
    if capability not in SHARED_LIMIT:
        raise ValueError(f"sm_{capability} is not one of {sorted(SHARED_LIMIT)}")
    source = _source(case)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages, **case.options}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except (TritonError, RuntimeError) as error:  # a pass of the compiler that fails raises a bare RuntimeError
        return Report(op, case.name, capability, case.vector_bytes, error=str(error) or type(error).__name__)
    fusion = kernel.metadata.enable_fp_fusion
    used = ptx.resources(kernel.asm["ptx"], kernel.asm["cubin"], capability, fused_multiply_add=fusion)
    return Report(
        op=op,
        case=case.name,
        capability=capability,
        wanted_load_bytes=case.vector_bytes,
        registers=used.registers,
        spill_store_bytes=used.spill_store_bytes,
        spill_load_bytes=used.spill_load_bytes,
        shared_bytes=kernel.metadata.shared,
        loads=ptx.load_widths(kernel.asm["ptx"]),
    )


def _source(case: CompileCase) -> ASTSource:
    names = case.kernel.arg_names
    # A configuration may be shared by the kernels of an op: each takes the blocks that it has.
    blocks = {name: size for name, size in case.config.blocks.items() if name in names}
    constexprs = {**blocks, **case.constexprs}
    described = [*case.signature, *constexprs]
    if sorted(described) != sorted(names):
        raise ValueError(f"{case.name} describes the arguments {sorted(described)}, the kernel has {sorted(names)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    unspecialised = {p.name for p in case.kernel.params if p.do_not_specialize}
    if strangers := [name for name in case.divisible if name not in case.signature or name in unspecialised]:
        raise ValueError(f"{case.name} calls divisible what is no argument, or is not specialised: {strangers}")
    unaligned = unspecialised | {p.name for p in case.kernel.params if p.do_not_specialize_on_alignment}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in case.divisible]
    aligned = [name for name in aligned if name not in unaligned]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def compile_ops(names: Iterable[str], capabilities: Iterable[int]) -> list[Report]:
    """Compiles every case of the ops in other processes, because Triton's compiler holds the interpreter's lock."""
    tasks = [
        (op, index, capability)
        for op, cases in ops.compile_cases(names).items()
        for index in range(len(cases))
        for capability in capabilities
    ]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        return pool.starmap(_compile_indexed, tasks, chunksize=1)


def _compile_indexed(op: str, index: int, capability: int) -> Report:
    return compile_case(op, _cases_of(op)[index], capability)


@cache
def _cases_of(op: str) -> list[CompileCase]:
    return ops.compile_cases([op])[op]


def to_json(reports: Iterable[Report]) -> str:
    plain = [
        {**asdict(report), "widest_load_bytes": report.widest_load_bytes, "problems": report.problems()}
        for report in reports
    ]
    return json.dumps(plain, indent=1) + "\n"


def to_table(reports: Iterable[Report]) -> str:
    rows = [("op", "case", "sm", "registers", "spilled", "shared KiB", "loads by bytes", "")]
    for report in reports:
        loads = " ".join(f"{width}x{count}" for width, count in report.loads.items())
        spilled = str(report.spill_store_bytes + report.spill_load_bytes)
        shared = f"{report.shared_bytes / 1024:.1f}"
        verdict = "; ".join(report.problems()) or "ok"
        rows.append(
            (report.op, report.case, str(report.capability), str(report.registers), spilled, shared, loads, verdict)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m patchclamp_kernels.compiled")
    parser.add_argument("--op", nargs="+", choices=list(ops.OPS), default=list(ops.OPS))
    parser.add_argument("--sm", nargs="+", type=int, choices=sorted(SHARED_LIMIT), default=list(CAPABILITIES))
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 makes interpreted kernels: unset it")
    reports = compile_ops(arguments.op, arguments.sm)
    print(to_table(reports))
    if arguments.json is not None:
        arguments.json.write_text(to_json(reports))
    bad = sum(bool(report.problems()) for report in reports)
    print(f"{len(reports)} variants, {bad} with a problem")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
