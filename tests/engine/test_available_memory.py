"""What a process can have of memory, read from files of /proc and /sys below a root of the test."""

import os
from pathlib import Path

import pytest

from patchclamp_server.engine.memory.available import available_memory, resident_memory
from patchclamp_server.engine.memory.on_top import admit_sparse_weights
from patchclamp_server.errors import FailedPrecondition

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712


def machine(root: Path, *, available: int, resident: int = 0, cgroup: str = "0::/\n") -> None:
    write(root, "proc/meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB\n")
    write(root, "proc/self/status", f"Name:\tpython\nVmRSS:\t{resident // 1024} kB\nThreads:\t7\n")
    write(root, "proc/self/cgroup", cgroup)


def write(root: Path, path: str, text: str | int) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n" if isinstance(text, int) else text)


def group(root: Path, path: str, *, limit: str | int, usage: int, files: int = 0, name: str = "memory.max") -> None:
    write(root, f"sys/fs/cgroup/{path}/{name}", limit if isinstance(limit, int) else f"{limit}\n")
    write(root, f"sys/fs/cgroup/{path}/memory.current", usage)
    write(root, f"sys/fs/cgroup/{path}/memory.stat", f"anon 7\ninactive_file {files}\nactive_file 0\n")


def test_without_limits_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    machine(tmp_path, available=5 * GIB)
    assert available_memory(root=tmp_path).bytes == 5 * GIB
    assert str(available_memory(root=tmp_path)) == "5.00 GiB are available (MemAvailable)"


def test_what_the_process_has_already_is_available_to_it(tmp_path: Path) -> None:
    machine(tmp_path, available=5 * GIB, resident=GIB)
    assert available_memory(root=tmp_path).bytes == 6 * GIB


def test_a_cgroup_leaves_its_limit_without_what_is_used_but_with_file_pages(tmp_path: Path) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="0::/serving\n")
    group(tmp_path, "serving", limit=4 * GIB, usage=3 * GIB, files=GIB)
    found = available_memory(root=tmp_path)
    assert found.bytes == 2 * GIB
    assert found.source == "cgroup memory.max is 4.00 GiB"


def test_a_cgroup_above_may_have_the_nearest_limit(tmp_path: Path) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="0::/tenant/serving\n")
    group(tmp_path, "tenant/serving", limit="max", usage=0)
    group(tmp_path, "tenant", limit=3 * GIB, usage=GIB)
    assert available_memory(root=tmp_path).bytes == 2 * GIB


def test_the_limit_above_which_a_cgroup_is_slowed_down_counts_too(tmp_path: Path) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="0::/serving\n")
    group(tmp_path, "serving", limit=8 * GIB, usage=GIB)
    group(tmp_path, "serving", limit=4 * GIB, usage=GIB, name="memory.high")
    assert available_memory(root=tmp_path).source == "cgroup memory.high is 4.00 GiB"


def test_in_a_container_the_root_of_the_mount_is_its_own_group(tmp_path: Path) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="0::/docker/0123456789\n")
    group(tmp_path, ".", limit=2 * GIB, usage=GIB)
    assert available_memory(root=tmp_path).bytes == GIB


def test_a_group_outside_of_the_namespace_is_not_looked_for(tmp_path: Path) -> None:
    machine(tmp_path, available=5 * GIB, cgroup="0::/../../elsewhere\n")
    assert available_memory(root=tmp_path).source == "MemAvailable"


@pytest.mark.parametrize(("limit", "left"), [(4 * GIB, 3.5 * GIB), (V1_UNLIMITED, 50 * GIB)])
def test_limits_of_the_first_version_hold_too(tmp_path: Path, limit: int, left: float) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="5:cpuacct,memory:/serving\n1:name=systemd:/\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/serving/memory.limit_in_bytes", limit)
    write(tmp_path, "sys/fs/cgroup/memory/serving/memory.usage_in_bytes", GIB)
    write(tmp_path, "sys/fs/cgroup/memory/serving/memory.stat", f"cache 1\ntotal_inactive_file {GIB // 2}\n")
    assert available_memory(root=tmp_path).bytes == left


def test_a_group_that_has_passed_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine(tmp_path, available=50 * GIB, cgroup="0::/serving\n")
    group(tmp_path, "serving", limit=GIB, usage=2 * GIB)
    assert available_memory(root=tmp_path).bytes == 0


def test_this_machine_can_be_asked() -> None:
    assert available_memory().bytes > 0


def test_copies_of_weights_that_the_machine_has_no_room_for_are_refused_with_the_numbers(tmp_path: Path) -> None:
    machine(tmp_path, available=5 * GIB, resident=GIB)
    admit_sparse_weights(5 * GIB, root=tmp_path)
    with pytest.raises(FailedPrecondition, match=r"MLP weights, 5\.50 GiB, and 5\.00 GiB are available \(MemAvail"):
        admit_sparse_weights(5 * GIB + GIB // 2, root=tmp_path)


def test_where_the_system_says_nothing_it_is_what_is_installed(tmp_path: Path) -> None:
    """As on macOS, which has no /proc."""
    found = available_memory(root=tmp_path)
    assert found.source == "physical memory"
    assert found.bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10 << 20 < resident_memory(tmp_path) < found.bytes


def test_a_limit_that_may_not_be_read_bounds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, available=5 * GIB, cgroup="0::/serving\n")
    group(tmp_path, "serving", limit=4 * GIB, usage=0)
    read_text = Path.read_text

    def refuse(path: Path) -> str:
        if path.name.startswith("memory."):
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert available_memory(root=tmp_path).bytes == 5 * GIB
