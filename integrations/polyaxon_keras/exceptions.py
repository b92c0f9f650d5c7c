"""Notice an exception that ends ``model.fit``, and whether it was raised within an optimizer step.

Keras notifies callbacks of neither.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from polyaxon_keras.framework import keras
    from polyaxon_tracking import PreemptionHandler

__all__ = ["ExceptionHook", "track_steps", "untrack_steps"]


class ExceptionHook:
    """An excepthook of the interpreter that reports an exception which ends the ``fit`` of one model.

    In a notebook, the exception ends the cell, and IPython calls no excepthook: it notifies of the end of each cell.

    Args:
        model: the model whose ``fit`` is running.
        save: called with the exception, after the traceback was printed.
    """

    def __init__(self, model: keras.Model, save: Callable[[BaseException], None]) -> None:
        self._model = model
        self._save = save
        self._previous = sys.excepthook
        self._preemption: PreemptionHandler | None = None
        self._shell: Any = None
        """The IPython shell that notifies this hook."""

    def install(self, preemption: PreemptionHandler) -> None:
        """Install this hook and the signal handlers of `preemption`."""
        _uninstall_hooks_of_failed_fits()
        self._previous, self._preemption = sys.excepthook, preemption
        sys.excepthook = self._handle
        if (ipython := sys.modules.get("IPython")) is not None and (shell := ipython.get_ipython()) is not None:
            shell.events.register("post_run_cell", self._handle_end_of_cell)
            self._shell = shell
        preemption.install()

    def uninstall(self) -> None:
        """Restore the previous hook, unless other code has replaced the hook since."""
        if sys.excepthook == self._handle:
            sys.excepthook = self._previous
        shell, self._shell = self._shell, None
        if shell is not None:
            shell.events.unregister("post_run_cell", self._handle_end_of_cell)

    def is_training(self, frame: FrameType | None) -> bool:
        """Return whether `frame` is within the ``fit`` of the model."""
        while frame is not None:
            if self._is_fit(frame):
                return True
            frame = frame.f_back
        return False

    def _is_fit(self, frame: FrameType) -> bool:
        # Keras removes its own frames from a traceback, except the frame of the wrapper that removes them.
        arguments, name = frame.f_locals, frame.f_code.co_name
        if name == "error_handler" and arguments.get("args"):
            return arguments["args"][0] is self._model and arguments["fn"].__name__ == "fit"
        return name == "fit" and arguments.get("self") is self._model

    def _handle(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._previous(kind, error, trace)
        self._save_if_fit_failed(error, trace)

    def _handle_end_of_cell(self, result: Any) -> None:
        """Save if the cell failed within the ``fit``; no ``fit`` continues after its cell."""
        error = result.error_in_exec
        if error is not None:
            self._save_if_fit_failed(error, error.__traceback__)
        self.uninstall()
        if self._preemption is not None:
            self._preemption.uninstall()

    def _save_if_fit_failed(self, error: BaseException, trace: TracebackType | None) -> None:
        if any(self._is_fit(frame) for frame, _ in traceback.walk_tb(trace)):
            self._save(error)


def _uninstall_hooks_of_failed_fits() -> None:
    """Uninstall the excepthook and signal handlers of fits whose exception was caught.

    Otherwise the excepthook and the handlers would keep the models of those fits in memory.
    """
    while True:
        hook = getattr(sys.excepthook, "__self__", None)
        if not isinstance(hook, ExceptionHook) or hook.is_training(sys._getframe()):  # noqa: SLF001
            return
        hook.uninstall()
        if hook._preemption is not None:  # noqa: SLF001
            hook._preemption.uninstall()  # noqa: SLF001


def track_steps(optimizer: keras.optimizers.Optimizer, record: Callable[..., None]) -> None:
    """Call ``record(is_running=True)`` before each step of `optimizer`, and ``record(is_running=False)`` after it.

    While a step is running, the model's state is inconsistent.
    """
    untrack_steps(optimizer)  # a training that an exception has ended did not do so
    apply = optimizer.apply

    def tracked_apply(*arguments: Any, **options: Any) -> Any:
        record(is_running=True)
        result = apply(*arguments, **options)
        record(is_running=False)
        return result

    optimizer.apply = tracked_apply


def untrack_steps(optimizer: keras.optimizers.Optimizer) -> None:
    """Restore the method that `track_steps` replaced."""
    vars(optimizer).pop("apply", None)
