"""Preemption: turn SIGTERM and Ctrl-C into a request that training honours between batches, when its state is whole."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from polyaxon_tracking.training.cloud_notices import CloudNotices

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any, ClassVar, NoReturn

    from typing_extensions import Self

__all__ = ["PreemptionHandler"]

_logger = logging.getLogger("polyaxon_tracking")

# Schedulers send these before they end a job: Slurm's `--signal` any of the first two, limits of CPU time the last.
# Windows has none of them.
_OTHER_NOTICES = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)]


# A launcher such as `timeout` sends a signal to the process and to its group: the second is no second request.
_SECONDS_OF_ONE_REQUEST = 0.1

# The kernel sends this one every second, from the soft limit of CPU time to the hard limit.
_REPEATED = {"SIGXCPU"}


class PreemptionHandler:
    """Turn the first SIGTERM or Ctrl-C into a request, so that training can save; a second signal ends it at once.

    So are SIGUSR1, SIGUSR2 and SIGXCPU, unless something else handles them: otherwise each would end the process.
    The previous signal handlers still run. Outside the main thread no signal is caught, because Python runs signal
    handlers only there. A signal that the block of the ``with`` statement did not check is not lost: at the end of the
    block, `exit` is called.

    Args:
        is_training: takes the interrupted frame and returns whether training is still running. If it is not, the signal
            has its previous effect.

    Examples:
        >>> with PreemptionHandler() as preemption:
        ...     for step in range(1000):
        ...         pass  # train, and save now and then
        ...         if preemption.requested:
        ...             pass  # save
        ...             preemption.exit()
    """

    _recording: ClassVar[PreemptionHandler | None] = None
    """The handler object that has just recorded a signal, while it runs the previous signal handlers."""

    def __init__(self, is_training: Callable[[FrameType | None], bool] = lambda _: True) -> None:
        self.requested: signal.Signals | None = None
        """The signal that was received, SIGTERM after `request`, or ``None``."""
        self._reason: str | None = None
        self._is_training = is_training
        self.is_installed = False
        """Whether the signal handlers are installed."""
        self._notices = CloudNotices(self.request)
        self._previous: dict[signal.Signals, Any] = {}
        self._requested_at = 0.0

    def __enter__(self) -> Self:
        """Install the signal handlers."""
        self.install()
        self.install_unhandled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Uninstall the signal handlers; call `exit` if a signal came and the block did not raise."""
        if kind is None and self.requested is not None:
            self.exit()
        self.uninstall()

    def install(self) -> None:
        """Install the signal handlers for SIGTERM and Ctrl-C. Does nothing if they are installed."""
        if self.is_installed:
            return
        self.requested, self._reason, self.is_installed = None, None, True
        self._notices.start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = _without_stale(signal.getsignal(number), number)
                if previous not in (self._handle, signal.SIG_IGN):  # a signal ignored as by `nohup` stays ignored
                    signal.signal(number, self._handle)
                    self._previous[number] = previous

    def install_unhandled(self) -> None:
        """Install the signal handlers for SIGUSR1, SIGUSR2 and SIGXCPU where the signal would end the process.

        A framework may install its own, such as Lightning's for Slurm's requeue, so call this method after that.
        """
        if threading.current_thread() is threading.main_thread():
            for number in _OTHER_NOTICES:
                previous = _without_stale(signal.getsignal(number), number)
                if previous == signal.SIG_DFL and not _has_native_handler(number):
                    signal.signal(number, self._handle)
                    self._previous[number] = previous

    def reinstall(self) -> None:
        """Install these signal handlers again, over any that were installed since; the newer handlers no longer run."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Uninstall the signal handlers and restore the previous handlers."""
        self.is_installed = False
        self._notices.stop()
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # otherwise another handler has been installed over it since
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, reason: str) -> None:
        """Request the end of training as the first SIGTERM does, for a notice that is no signal.

        A signal that follows counts as the first. After a signal, this method does nothing.

        Args:
            reason: what is logged.
        """
        if self.is_installed and self.requested is None:
            self.requested, self._reason = signal.SIGTERM, reason
            _logger.warning("%s: training ends as after SIGTERM, after this batch, and is saved", reason)

    def exit(self, number: int | None = None) -> NoReturn:
        """Exit as the signal requests: ``KeyboardInterrupt`` for Ctrl-C, otherwise 128 and the number of the signal.

        A shell reports the same for a process that the signal ends. The platform reads 143, of SIGTERM, as preempted
        and not done.

        Args:
            number: the signal, if another rank of the same training received it.
        """
        if number is not None:
            self.requested = signal.Signals(number)
        self.uninstall()
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.requested or signal.SIGTERM))  # 143 after SIGTERM

    def _handle(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        previous = self._previous.get(caught)
        is_first = self.requested is None or self._reason is not None
        if self.is_installed and is_first and self._is_training(frame):
            self.requested, self._reason = caught, None
            _logger.warning(
                "Received %s: training ends after this batch and is saved. A second one ends it at once", caught.name
            )
            outer, PreemptionHandler._recording = PreemptionHandler._recording, self
            try:
                _run_previous(previous, number, frame)
            finally:
                PreemptionHandler._recording = outer
                self._requested_at = time.monotonic()
            return
        is_recent = time.monotonic() - self._requested_at < _SECONDS_OF_ONE_REQUEST
        if self.is_installed and caught == self.requested and (is_recent or caught.name in _REPEATED):
            return
        # If the handler of another training has recorded this signal, that training continues: do not end it.
        if PreemptionHandler._recording not in (None, self):
            _run_previous(previous, number, frame)
            return
        self.uninstall()
        if caught == self.requested == signal.SIGTERM:
            previous = signal.SIG_DFL  # the second SIGTERM ends the process at once
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(caught, signal.SIG_DFL)
            os.kill(os.getpid(), caught)


def _run_previous(handler: Any, number: int, frame: FrameType | None) -> None:
    """Run the user's or a framework's handler, but not Python's default one, which would end the process."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, frame)


def _has_native_handler(number: signal.Signals) -> bool:
    """Return whether a handler that Python does not know catches the signal, as `faulthandler.register` installs."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            [caught] = [line.split()[1] for line in status if line.startswith("SigCgt:")]
    except (OSError, ValueError):  # no Linux
        return False
    return bool(int(caught, 16) >> (number - 1) & 1)


def _without_stale(handler: Any, number: signal.Signals) -> Any:
    """Return the handler below uninstalled handlers of this class, which a framework restores when training fails."""
    while isinstance(stale := getattr(handler, "__self__", None), PreemptionHandler) and not stale.is_installed:
        handler = stale._previous.get(number)  # noqa: SLF001
    return handler
