"""How much memory this process may still allocate, by the machine, by its container, and by its own limit."""

from __future__ import annotations

import os
import sys

__all__ = ["available_memory"]


def available_memory() -> int:
    """Return the number of bytes that this process may still allocate, as far as the system reports it.

    The number is the minimum of three: the machine's available memory (``MemAvailable`` of ``proc(5)``); the rest of
    the limits of this process's control groups (``memory.max`` of ``cgroups(7)``, or ``memory.limit_in_bytes`` of
    version 1; cached files do not count as used, because the kernel frees them); and the rest of ``ulimit -v``.

    Where there is no ``/proc``, as on macOS, psutil reports the machine's available memory, if psutil is installed.
    Otherwise, half of the machine's memory that this process has never used counts as available, because other programs
    need memory too: a save in the foreground is better than a laptop that swaps.

    The number is ``sys.maxsize`` if the system reports nothing.

    Examples:
        >>> available_memory() > 0
        True
    """
    return max(0, min(_of_machine("/proc/meminfo"), _of_cgroups("/proc/self/cgroup", "/sys/fs/cgroup"), _of_process()))


def _of_machine(meminfo: str) -> int:
    fields = _fields(meminfo)
    return fields["MemAvailable:"] * 1024 if "MemAvailable:" in fields else _of_machine_without_proc()


def _of_machine_without_proc() -> int:
    try:
        import psutil  # in a function, because it is optional

        return int(psutil.virtual_memory().available)
    except (ImportError, OSError):  # psutil is not installed, or needs ``/proc`` itself
        return _half_of_unused()


def _half_of_unused() -> int:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return sys.maxsize
    unit = 1 if sys.platform == "darwin" else 1024  # see getrusage(2) of each system
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() - used) // 2


def _of_cgroups(membership: str, mount: str) -> int:
    least = sys.maxsize
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = os.path.join(mount, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container, the path may be the host's, although only its upper part is mounted, as the root.
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            directory = os.path.join(root, *parts[:depth])
            allowed, used = _read(os.path.join(directory, limit)), _read(os.path.join(directory, usage))
            if allowed.isdecimal() and used.isdecimal():
                statistics = _fields(os.path.join(directory, "memory.stat"))
                cached = statistics.get("active_file", 0) + statistics.get("inactive_file", 0)
                least = min(least, int(allowed) - int(used) + cached)
    return least


def _of_process() -> int:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read("/proc/self/statm").partition(" ")[0]
    if limit == resource.RLIM_INFINITY or not pages:
        return sys.maxsize
    return limit - int(pages) * resource.getpagesize()


def _fields(path: str) -> dict[str, int]:
    words = [line.split() for line in _read(path).splitlines()]
    return {name: int(value) for name, value, *_ in words if value.isdecimal()}


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:  # not Linux, or a kernel without this file
        return ""
