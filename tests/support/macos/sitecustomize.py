"""Take away from Linux's Python what macOS lacks, in each process that has this folder on its PYTHONPATH.

The names are those that typeshed has for Linux and not for macOS. `sys.platform` stays, because the standard library
would then import modules that only macOS has.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys
from typing import Any

MISSING: dict[Any, str] = {
    signal: "sigwaitinfo sigtimedwait pidfd_send_signal SIGCLD SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT",
    os: "copy_file_range eventfd fdatasync getrandom getresgid getresuid getxattr listxattr memfd_create pidfd_open pipe2 "
    "posix_fadvise posix_fallocate removexattr sched_getaffinity sched_setaffinity sendfile setns setxattr splice unshare "
    "O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_RSYNC O_TMPFILE",
    select: "epoll",
}
PATHS = ("/proc", "/sys", "/dev/shm")


def no_such_path(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise the error of a path that does not exist, before Python opens or lists it."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        path = os.fsdecode(arguments[0])
        if path.startswith(PATHS):
            raise FileNotFoundError(2, "No such file or directory", path)


class Library(ctypes.CDLL):
    """A C library without prctl(2)."""

    def __getattr__(self, name: str) -> Any:
        if name == "prctl":
            raise AttributeError("dlsym(RTLD_DEFAULT, prctl): symbol not found")
        return super().__getattr__(name)


for module, names in MISSING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
ctypes.CDLL = Library  # type: ignore[misc]
# Linux's kernel refuses this command, as a network mount does on macOS.
fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]
sys.addaudithook(no_such_path)
