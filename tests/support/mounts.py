"""A mount whose server is gone, as after the end of a FUSE driver: the kernel answers every call with ENOTCONN."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MNT_DETACH = 2  # of umount2(2)


@contextlib.contextmanager
def without_a_server(directory: Path) -> Iterator[None]:
    """Mount a FUSE file system at `directory`, and close its connection."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs a kernel with FUSE, and a user who may mount")
    libc = ctypes.CDLL(None, use_errno=True)
    connection = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={connection},rootmode=40000,user_id=0,group_id=0".encode()
    failed = libc.mount(b"gone", os.fsencode(directory), b"fuse", 0, options)
    number = ctypes.get_errno()
    os.close(connection)
    if failed:
        raise OSError(number, os.strerror(number))
    try:
        yield
    finally:
        libc.umount2(os.fsencode(directory), _MNT_DETACH)
