"""Every kernel variant in use, compiled for sm_80 and sm_90 without a GPU, in a child: tests run interpreted."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import toy_kernels

from patchclamp_kernels import ops, ptx
from patchclamp_kernels.compiled import CAPABILITIES, SHARED_LIMIT, compile_case

VARIANTS = [
    (op, case.name, capability)
    for op, cases in ops.compile_cases().items()
    for case in cases
    for capability in CAPABILITIES
]

Reports = dict[tuple[str, str, int], dict[str, Any]]


def compiled(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Python with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def by_variant(text: str) -> Reports:
    return {(report["op"], report["case"], report["capability"]): report for report in json.loads(text)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    file = tmp_path_factory.mktemp("compiled") / "reports.json"
    done = compiled(["-m", "patchclamp_kernels.compiled", "--json", str(file)])
    assert file.is_file(), done.stderr
    return by_variant(file.read_text())


@pytest.fixture(scope="module")
def toys() -> Reports:
    done = compiled([toy_kernels.__file__, "90"])
    assert done.returncode == 0, done.stderr
    return by_variant(done.stdout)


@pytest.mark.parametrize(("op", "case", "capability"), VARIANTS)
def test_variant_compiles_without_spills_and_with_vector_loads(
    reports: Reports, op: str, case: str, capability: int
) -> None:
    report = reports[op, case, capability]
    assert report["error"] == ""
    assert (report["spill_store_bytes"], report["spill_load_bytes"]) == (0, 0)
    assert report["widest_load_bytes"] >= report["wanted_load_bytes"]
    assert report["shared_bytes"] <= SHARED_LIMIT[capability]


def test_a_plain_copy_loads_sixteen_bytes_and_has_no_problem(toys: Reports) -> None:
    report = toys["toy", "fits", 90]
    assert report["widest_load_bytes"] == 16
    assert report["problems"] == []


@pytest.mark.parametrize("case", ["strided", "unaligned mask"])
def test_scalar_loads_are_a_problem(toys: Reports, case: str) -> None:
    report = toys["toy", case, 90]
    assert report["widest_load_bytes"] <= 4
    assert report["problems"] == ["loads at most 2 bytes at once, not 16"]


def test_a_block_beyond_the_registers_of_its_warp_is_reported_to_spill(toys: Reports) -> None:
    report = toys["toy", "too many registers", 90]
    assert report["spill_store_bytes"] > 0
    assert report["spill_load_bytes"] > 0
    assert report["problems"][0].startswith("spills: ")


def test_a_kernel_that_does_not_compile_is_reported_with_the_compilers_words(toys: Reports) -> None:
    (problem,) = toys["toy", "not a power of two", 90]["problems"]
    assert problem.startswith("does not compile: ")
    assert "power of 2" in problem


def test_more_shared_memory_than_a_block_gets_is_a_problem(toys: Reports) -> None:
    (problem,) = toys["toy", "too much shared memory", 90]["problems"]
    assert problem.startswith("takes ")


def test_the_interpreter_has_nothing_to_compile() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case("toy", toy_kernels.CASES[0], 90)


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ], %rd4;", 16),
        ("ld.global.nc.v2.f32 {%f1, %f2}, [%rd1];", 8),
        ("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];", 16),
        ("ld.volatile.global.u64 %rd1, [%rd2];", 8),
        ("ld.acquire.gpu.global.b32 %r1, [%rd2];", 4),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [%r1], [%rd1], 4;", 4),
        ("cp.async.cg.shared::cta.global.L2::cache_hint [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10, %rd9;", 16),
    ],
)
def test_the_width_of_a_load_is_read_from_its_instruction(line: str, width: int) -> None:
    assert ptx.load_widths(f"\t{line}\n") == {width: 1}


@pytest.mark.parametrize(
    "line",
    [
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];",
        "ld.param.b64 %rd1, [kernel_param_0];",
        "st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };",
        "cp.async.commit_group;",
        "cp.async.wait_group 0x2;",
    ],
)
def test_other_instructions_are_no_loads_from_global_memory(line: str) -> None:
    assert ptx.load_widths(f"\t{line}\n") == {}
