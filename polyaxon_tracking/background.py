"""One thread that writes checkpoints while training goes on."""

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
    """Write in one thread, in the order of `submit`, and raise in the caller's thread what went wrong.

    After a write that failed nothing more is done until its error was raised, so that no old checkpoint is removed for
    a new one that is not there. When the interpreter exits, it waits as `wait` does.

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
        if not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
            raise TrackingError(f"Received write_timeout={timeout!r}. Expected a timedelta above zero.")
        self._timeout = timeout.total_seconds()
        self._jobs: collections.deque[_Job] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._runs = False
        self._error: BaseException | None = None
        self._waits_at_exit = False
        _writers.add(self)

    @property
    def pending(self) -> bool:
        """Whether something is still to be written."""
        # A process forked from this one has its memory, but not the thread.
        return self._runs and self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a write failed whose error was not raised yet."""
        return self._error is not None

    def submit(self, what: str, write: Callable[[], object]) -> None:
        """Have `write` called in the thread after all that was submitted before.

        Args:
            what: what it writes, for messages.
            write: a function without arguments.

        Raises:
            BaseException: that of an earlier write; then this one is not done.
        """
        self._raise_error()
        if not self._waits_at_exit:
            self._waits_at_exit = True
            _at_exit(self.wait)
        with self._changed:
            self._jobs.append(_Job(what, write))
            if not self.pending:
                self._runs = True
                # A daemon, for which the interpreter does not wait without a limit.
                self._thread = threading.Thread(target=self._run, name="polyaxon-tracking-writer", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Return when all that was submitted is written; a long wait shows how far it is.

        Raises:
            BaseException: that of a write.
            TrackingError: the time is over; the writes go on.
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
            thread.join()  # it has nothing left to do, but what it does last must not meet the interpreter's end
            with self._changed:
                if self._thread is thread:
                    self._thread = None  # it refers to the `sys.excepthook` of its beginning, and that to a model
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
            job = self._jobs[0]
            try:
                job.write()
            except BaseException as error:  # noqa: BLE001  # carried over to the thread that waits for the write
                self._error = error
            with self._changed:
                if self._error is None:
                    self._jobs.popleft()
                else:
                    self._jobs.clear()
                self._changed.notify_all()
                if not self._jobs:
                    self._runs = False
                    return


def _at_exit(wait: Callable[[], None]) -> None:
    """Have `wait` called when the interpreter exits, while what it waits for can still do its work.

    Drivers of object stores look up names in an executor of `concurrent.futures`, which ends before the callbacks of
    `atexit`; so it needs a private name, with which that module registers itself.
    """
    import concurrent.futures.thread  # noqa: F401  # first, since the last to be registered is the first to be called

    register = getattr(threading, "_register_atexit", None) or atexit.register
    register(wait)


def wait_for_all() -> None:
    """Return when all that any writer of this process was given is written, or raise what went wrong."""
    for writer in list(_writers):
        writer.wait()


class _Job(NamedTuple):
    what: str
    write: Callable[[], object]
