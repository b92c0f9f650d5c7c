"""Directories that all processes of a machine share: one process fills each, and none is removed while in use."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from typing import TYPE_CHECKING

from polyaxon_tracking.storage.locks import LOCK, lock_file, remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable

__all__: list[str] = []

_logger = logging.getLogger("polyaxon_tracking")

_PAUSE_SECONDS = 0.05


def hold(directory: str, is_complete: Callable[[], bool], fill: Callable[[], None], url: str) -> int:
    """Return a shared lock that keeps `directory` from being removed, once it is complete.

    Args:
        directory: the directory; it is created.
        is_complete: returns whether everything is in the directory.
        fill: puts everything there, or raises. Only one process at a time calls it; the others wait.
        url: where the content comes from, for the log.

    Returns:
        The descriptor of the lock. Closing it ends the lock.
    """
    while True:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        try:
            lock = os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another process has just removed the directory
        try:
            try:
                lock_file(lock, fcntl.LOCK_SH)
            except BlockingIOError:
                _logger.info("Waiting for another process of this machine that downloads %s", url)
                fcntl.flock(lock, fcntl.LOCK_SH)
            if not is_complete():
                lock_file(lock, fcntl.LOCK_EX)
                if os.fstat(lock).st_nlink:  # otherwise another process has just removed the directory
                    fill()
                lock_file(lock, fcntl.LOCK_SH)
            if is_complete():
                return lock
        except BlockingIOError:  # another process also wants to fill the directory
            time.sleep(_PAUSE_SECONDS)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def is_held(directory: str) -> bool:
    """Return whether a process holds or fills `directory`."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(directory, LOCK), "rb") as lock:
        try:
            lock_file(lock.fileno())
        except BlockingIOError:
            return True
    return False


def remove_unused(directory: str) -> bool:
    """Remove `directory` unless a process holds it, and return whether this process has removed it."""
    is_removed = False
    try:
        lock = os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        pass  # a process that is just creating the directory creates it again
    else:
        with contextlib.suppress(BlockingIOError):  # in use
            if lock_file(lock):
                remove_tree(directory)
                is_removed = True
        os.close(lock)
    # NFS keeps the name of an open file until it is closed, so the directory may be there still, and empty.
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    return is_removed
