"""Show the progress of long work: a bar on a terminal and in a notebook, elsewhere a line every few seconds.

Nothing is shown for short work.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from typing_extensions import Self

__all__: list[str] = []

_logger = logging.getLogger("polyaxon_tracking")

_SHORT_SECONDS = 2.0
_EVERY_SECONDS = 5.0
_REFRESH_SECONDS = 0.2

# The progress of each hidden thread, by its identifier. It is shown only while another thread waits for that thread.
_hidden: dict[int, Progress | None] = {}


class Display:
    """A tqdm bar on a terminal and in a notebook, if tqdm is installed, as by most frameworks; otherwise log lines."""

    def __init__(self) -> None:
        self._started = self._shown = self._drawn = time.monotonic()
        self._has_bar = _is_terminal() or _is_notebook()
        self._bar: Any = None

    @property
    def seconds_to_next(self) -> float:
        """The number of seconds until the display is due for an update."""
        if self._has_bar:
            return _REFRESH_SECONDS
        return max(0.0, self._shown + _EVERY_SECONDS - time.monotonic())

    def show(self, what: str, progress: Progress | None = None, *, more: str = "") -> None:
        """Show `what`, and its bytes if they are counted, unless the last update is recent; only lines show `more`."""
        now = time.monotonic()
        if self._has_bar and now - self._started >= _SHORT_SECONDS and now - self._drawn >= _REFRESH_SECONDS:
            self._drawn = now
            self._draw(what, progress)
        if not self._has_bar and now - self._shown >= _EVERY_SECONDS:
            self._shown = now
            counted = "" if progress is None else f": {progress.done // 10**6} of {progress.total // 10**6} MB"
            _logger.info("%s%s%s", what, more, counted)

    def _draw(self, what: str, progress: Progress | None) -> None:
        done, total = (0, None) if progress is None else (progress.done, progress.total)
        form = "{desc}{elapsed}" if total is None else None
        if self._bar is not None and self._bar.total != total:  # a notebook's bar cannot take another one
            self.close()
        if self._bar is None:
            try:
                from tqdm.auto import tqdm  # here and not above: only long work needs tqdm, which may be missing
            except ModuleNotFoundError:
                self._has_bar = False
                return
            self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, bar_format=form)
            self._bar.start_t = time.time() - (time.monotonic() - self._started)
        self._bar.n = done
        self._bar.set_description(what)  # this also draws the bar

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress:
    """Count the bytes of one piece of work, and show the progress; in a hidden thread, only while another thread waits.

    Args:
        what: the work, such as ``"Downloading s3://bucket/file"``.
        total: the number of bytes to process.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.done = 0
        """The number of bytes processed so far."""
        self.total = total
        self._lock = threading.Lock()  # the files of a checkpoint are read in parallel
        self._thread = threading.get_ident()
        self._display = None if self._thread in _hidden else Display()
        if self._display is None:
            _hidden[self._thread] = self

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._display is None:
            _hidden[self._thread] = None
        else:
            self._display.close()

    def advance(self, count: int) -> None:
        """Add `count` processed bytes, and update the display."""
        with self._lock:
            self.reach(self.done + count)

    def reach(self, done: int) -> None:
        """Set the number of processed bytes, and update the display. A retry may set a lower number than before."""
        self.done = done
        if self._display is not None:
            self._display.show(self.what, self)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no standard error, or its replacement lacks methods
        return False


def _is_notebook() -> bool:
    """Return whether this process is a kernel of Jupyter."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def hide() -> None:
    """Hide the progress of this thread from now on."""
    _hidden[threading.get_ident()] = None


def unhide() -> None:
    """Undo `hide`, at the end of the thread."""
    _hidden.pop(threading.get_ident(), None)


def of_thread(thread: threading.Thread | None) -> Progress | None:
    """Return the current progress of `thread` if that thread is hidden, otherwise None."""
    return None if thread is None or thread.ident is None else _hidden.get(thread.ident)
