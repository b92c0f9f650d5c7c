"""How far long work is: a bar on a terminal, a line every few seconds elsewhere, nothing where it is short."""

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

# What threads do whose work is not shown before somebody waits for it, by the thread.
_unseen: dict[int, Progress | None] = {}


class Display:
    """A bar where standard error is a terminal and tqdm is installed, as most frameworks have it; otherwise lines."""

    def __init__(self) -> None:
        self._began = self._told = self._drawn = time.monotonic()
        self._terminal = _is_terminal()
        self._bar: Any = None

    @property
    def seconds_to_next(self) -> float:
        """In how many seconds there is something to show."""
        if self._terminal:
            return _REFRESH_SECONDS
        return max(0.0, self._told + _EVERY_SECONDS - time.monotonic())

    def show(self, what: str, progress: Progress | None = None, *, more: str = "") -> None:
        """Tell of `what`, and of its bytes where they are counted, if it is time; `more` is for a line alone."""
        now = time.monotonic()
        if self._terminal and now - self._began >= _SHORT_SECONDS and now - self._drawn >= _REFRESH_SECONDS:
            self._drawn = now
            self._draw(what, progress)
        if not self._terminal and now - self._told >= _EVERY_SECONDS:
            self._told = now
            counted = "" if progress is None else f": {progress.done // 10**6} of {progress.total // 10**6} MB"
            _logger.info("%s%s%s", what, more, counted)

    def _draw(self, what: str, progress: Progress | None) -> None:
        done, total = (0, None) if progress is None else (progress.done, progress.total)
        form = "{desc}{elapsed}" if total is None else None
        if self._bar is None:
            try:
                from tqdm import tqdm  # here and not above: it is needed where work is long, and may be missing
            except ModuleNotFoundError:
                self._terminal = False
                return
            self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, bar_format=form)
            self._bar.start_t = time.time() - (time.monotonic() - self._began)
        self._bar.n, self._bar.total, self._bar.bar_format = done, total, form
        self._bar.set_description(what)  # and draw it

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress:
    """Count the bytes of one piece of work, and show how far it is; in the thread of a writer, only when asked.

    Args:
        what: what is done, such as ``"Downloading s3://bucket/file"``.
        total: bytes to do.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.done = 0
        """Bytes that are done."""
        self.total = total
        self._lock = threading.Lock()  # parts of a checkpoint are read side by side
        self._thread = threading.get_ident()
        self._display = None if self._thread in _unseen else Display()
        if self._display is None:
            _unseen[self._thread] = self

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._display is None:
            _unseen[self._thread] = None
        else:
            self._display.close()

    def advance(self, count: int) -> None:
        """Tell that `count` bytes more are done."""
        with self._lock:
            self.reach(self.done + count)

    def reach(self, done: int) -> None:
        """Tell that so many bytes are done, which may be less than before where something is done again."""
        self.done = done
        if self._display is not None:
            self._display.show(self.what, self)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or what stands in for it has not all of its methods
        return False


def hide() -> None:
    """Do not show what this thread does from now on."""
    _unseen[threading.get_ident()] = None


def unhide() -> None:
    """Forget `hide`, at the end of the thread."""
    _unseen.pop(threading.get_ident(), None)


def of_thread(thread: threading.Thread | None) -> Progress | None:
    """What is under way in `thread`, if it is one that was hidden."""
    return None if thread is None or thread.ident is None else _unseen.get(thread.ident)
