"""How much memory there is, for this machine and for what its containers write of themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from polyaxon_tracking.training import available_memory, memory

GIB = 1 << 30


def write(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_there_is_some_and_not_more_than_the_machine_has() -> None:
    [total] = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < available_memory() < int(total) * 1024


def test_the_limit_of_a_process_counts() -> None:
    code = (
        "import resource; from polyaxon_tracking.training import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY)); print(available_memory())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert GIB // 2 < int(output) < GIB


@pytest.mark.parametrize(
    ("limit", "available"), [(4 * GIB, 3 * GIB), ("max", sys.maxsize)], ids=["limited", "not limited"]
)
def test_the_limit_of_a_container_counts_without_its_cached_files(
    tmp_path: Path, limit: object, available: int
) -> None:
    write(tmp_path, membership="0::/")
    write(tmp_path / "cgroup", memory__max=limit, memory__current=2 * GIB)
    write(tmp_path / "cgroup", memory__stat=f"anon {GIB}\ninactive_file {GIB // 4}\nactive_file {3 * GIB // 4}")
    assert memory._of_cgroups(str(tmp_path / "membership"), str(tmp_path / "cgroup")) == available


def test_the_least_of_the_limits_around_counts(tmp_path: Path) -> None:
    write(tmp_path, membership="0::/pods/mine")
    for path, limit in (("cgroup", "max"), ("cgroup/pods", 5 * GIB), ("cgroup/pods/mine", 8 * GIB)):
        write(tmp_path / path, memory__max=limit, memory__current=GIB, memory__stat="inactive_file 0")
    assert memory._of_cgroups(str(tmp_path / "membership"), str(tmp_path / "cgroup")) == 4 * GIB


def test_version_1_in_a_container_that_does_not_see_its_own_path(tmp_path: Path) -> None:
    write(tmp_path, membership="4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n1:name=systemd:/")
    write(
        tmp_path / "cgroup" / "memory",
        memory__limit_in_bytes=2 * GIB,
        memory__usage_in_bytes=GIB,
        memory__stat="inactive_file 0",
    )
    assert memory._of_cgroups(str(tmp_path / "membership"), str(tmp_path / "cgroup")) == GIB


def test_a_system_without_control_groups_has_no_limit_of_them(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    assert memory._of_cgroups(nothing, nothing) == sys.maxsize


def test_a_machine_without_meminfo_has_what_psutil_says_or_else_half_of_what_was_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = psutil.virtual_memory().total
    used = psutil.Process().memory_info().rss
    assert 0 < memory._half_of_unused() < (total - used // 2) // 2
    assert 0 < memory._of_machine(str(tmp_path / "nothing")) < total
    monkeypatch.setitem(sys.modules, "psutil", None)  # as where psutil is not installed
    assert memory._of_machine(str(tmp_path / "nothing")) == memory._half_of_unused()
