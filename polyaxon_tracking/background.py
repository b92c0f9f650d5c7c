"""One thread that writes checkpoints while training continues."""

from __future__ import annotations

import atexit
import collections
import contextlib
import threading
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.progress import Display, hide, of_thread, unhide

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BackgroundWriter"]

_writers: weakref.WeakSet[BackgroundWriter] = weakref.WeakSet()


class BackgroundWriter:
    """Write checkpoints in one background thread, in the order of `submit`, and raise errors in the caller's thread.

    After a failed write, nothing more is written until its error is raised, so that no old checkpoint is removed for a
    new checkpoint that was not saved. When the interpreter exits, it waits for the writes as `wait` does.

    Args:
        timeout: how long `wait` waits at most.

    Raises:
        TrackingError: `timeout` is not a timedelta above zero.

    Examples:
        >>> writer = BackgroundWriter()
        >>> writer.submit("model.txt", lambda: Path("model.txt").write_text("weights"))
        >>> writer.wait()
        >>> Path("model.txt").read_text()
        'weights'
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        check_write_timeout(timeout)
        self._timeout = timeout.total_seconds()
        self._jobs: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_running = False
        self._error: BaseException | None = None
        self._registered_at_exit = False
        self.seconds_of_last_write = 0.0
        """How long the last write that is done has taken."""
        _writers.add(self)

    @property
    def pending(self) -> bool:
        """Return whether a write is running or queued."""
        # A process forked from this process has a copy of its memory, but not the thread.
        return self._is_running and self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Return whether a write failed and its error was not raised yet."""
        return self._error is not None

    def submit(self, what: str, write: Callable[[], object]) -> None:
        """Queue `write`, which the background thread calls after all earlier writes.

        Args:
            what: the file or checkpoint that `write` writes, for messages.
            write: a function without arguments.

        Raises:
            BaseException: the error of an earlier write; then this write is not queued.
        """
        self._raise_error()
        if not self._registered_at_exit:
            self._registered_at_exit = True
            _at_exit(self.wait)
        with self._changed:
            self._jobs.append(_Job(what, write))
            if not self.pending:
                self._is_running = True
                # A daemon thread, because the interpreter would wait for another thread without a limit.
                self._thread = threading.Thread(target=self._run, name="polyaxon-tracking-writer", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait until all submitted writes are done; a long wait shows their progress.

        Raises:
            BaseException: the error of a write.
            TrackingError: the timeout has passed; the writes continue.
        """
        started = time.monotonic()
        display = Display()
        with contextlib.closing(display), self._changed:
            while self.pending:
                now = time.monotonic()
                if now - started >= self._timeout:
                    raise TrackingError(
                        f"Received no end of writing {self._jobs[0].what} in {self._timeout:g} s. Expected the disk or "
                        f"the store to take it sooner. See what holds it up, or allow more with a longer "
                        f"write_timeout; what was saved before is untouched."
                    )
                display.show(
                    f"Waiting for {self._jobs[0].what} to be written",
                    of_thread(self._thread),
                    more=f", {now - started:.0f} of at most {self._timeout:g} s so far",
                )
                self._changed.wait(min(display.seconds_to_next, started + self._timeout - now))
        if (thread := self._thread) is not None:
            thread.join()  # it must have ended before the interpreter exits
            with self._changed:
                if self._thread is thread:
                    self._thread = None  # it refers to the `sys.excepthook` of its start, and that to a model
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        hide()
        try:
            self._write_all()
        finally:
            unhide()

    def _write_all(self) -> None:
        while True:
            job, began = self._jobs[0], time.monotonic()
            try:
                job.write()
                self.seconds_of_last_write = time.monotonic() - began
            except BaseException as error:  # noqa: BLE001  # raised in the thread that waits for the write
                self._error = error
            with self._changed:
                if self._error is None:
                    self._jobs.popleft()
                else:
                    self._jobs.clear()
                self._changed.notify_all()
                if not self._jobs:
                    self._is_running = False
                    return


def check_write_timeout(timeout: object) -> None:
    """Raise a `TrackingError` unless `timeout` is a timedelta above zero."""
    if not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise TrackingError(f"Received write_timeout={timeout!r}. Expected a timedelta above zero.")


def _at_exit(wait: Callable[[], None]) -> None:
    """Register `wait` to be called when the interpreter exits, while the background writes can still finish.

    The drivers of object stores resolve host names in an executor of `concurrent.futures`, which shuts down before the
    callbacks of `atexit`. So this needs the private function with which that module registers its own shutdown.
    """
    import concurrent.futures.thread  # noqa: F401  # the last function registered is the first called

    register = getattr(threading, "_register_atexit", None) or atexit.register
    register(wait)


def wait_for_all() -> None:
    """Wait until every `BackgroundWriter` of this process has done its writes, or raise the error of a write."""
    for writer in list(_writers):
        writer.wait()


class _Job(NamedTuple):
    what: str
    write: Callable[[], object]
