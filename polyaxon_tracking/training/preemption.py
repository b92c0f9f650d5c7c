"""SIGTERM and Ctrl-C as a request that training honours between two batches, where its state is whole."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any, ClassVar, NoReturn

    from typing_extensions import Self

__all__ = ["PreemptionHandler"]

_logger = logging.getLogger("polyaxon_tracking")

# What a shell reports for a process that SIGTERM ended: the platform takes it for preempted, not for done.
_EXIT_STATUS = 128 + signal.SIGTERM


class PreemptionHandler:
    """Turn the first SIGTERM or Ctrl-C into a request, so that training can finish a batch and save; a second ends it.

    Handlers that were there before still run. Outside the main thread, where Python runs no handlers, nothing is
    caught. A signal that the block of the ``with`` statement did not look at is not lost: at its end, `exit` is called.

    Args:
        is_training: given the frame that was interrupted, whether training still goes on; where it does not, the signal
            does what it did before.

    Examples:
        >>> with PreemptionHandler() as preemption:
        ...     for step in range(1000):
        ...         pass  # train, and save now and then
        ...         if preemption.requested:
        ...             pass  # save
        ...             preemption.exit()
    """

    _taker: ClassVar[PreemptionHandler | None] = None
    """The one that has taken a signal, while the handlers that were there before it run."""

    def __init__(self, is_training: Callable[[FrameType | None], bool] = lambda _: True) -> None:
        self.requested: signal.Signals | None = None
        """The signal that came, or ``None``."""
        self._is_training = is_training
        self._listens = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Start to listen."""
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening; where a signal came that did not end the block, `exit` it now."""
        if kind is None and self.requested is not None:
            self.exit()
        self.uninstall()

    def install(self) -> None:
        """Start to listen."""
        self.requested, self._listens = None, True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = _without_stale(signal.getsignal(number), number)
                if before not in (self._handle, signal.SIG_IGN):  # `nohup` and the like ignore it
                    signal.signal(number, self._handle)
                    self._before[number] = before

    def reinstall(self) -> None:
        """Put aside the handlers that were installed over these since: they hear nothing any more."""
        for number in self._before:
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Stop listening; the handlers that were there before are there again."""
        self._listens = False
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:  # otherwise another one has been put on top since
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def exit(self, number: int | None = None) -> NoReturn:
        """Leave training as the signal asks: exit status 143 for SIGTERM, ``KeyboardInterrupt`` for Ctrl-C.

        Args:
            number: the signal, where it was another process of the same training that received it.
        """
        if number is not None:
            self.requested = signal.Signals(number)
        self.uninstall()
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(_EXIT_STATUS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        before = self._before.get(caught)
        if self._listens and self.requested is None and self._is_training(frame):
            self.requested = caught
            _logger.warning(
                "Received %s: training ends after this batch and is saved. A second one ends it at once", caught.name
            )
            outer, PreemptionHandler._taker = PreemptionHandler._taker, self
            try:
                _run(before, number, frame)
            finally:
                PreemptionHandler._taker = outer
            return
        if PreemptionHandler._taker not in (None, self):  # one of a training that goes on, which this one is not to end
            _run(before, number, frame)
            return
        self.uninstall()
        if caught == self.requested == signal.SIGTERM:
            before = signal.SIG_DFL  # the second: nothing holds it up any more
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(caught, signal.SIG_DFL)
            os.kill(os.getpid(), caught)


def _run(handler: Any, number: int, frame: FrameType | None) -> None:
    """Run a handler of the user's or a framework's; not the one of Python, which would end the process."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, frame)


def _without_stale(handler: Any, number: signal.Signals) -> Any:
    """What was there before one that no longer listens: a framework may have put it back when its training failed."""
    while isinstance(stale := getattr(handler, "__self__", None), PreemptionHandler) and not stale._listens:  # noqa: SLF001
        handler = stale._before.get(number)  # noqa: SLF001
    return handler
