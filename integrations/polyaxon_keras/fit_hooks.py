"""The callbacks beside this one in a ``fit``: which do not go with it, and what they do to the weights."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import TYPE_CHECKING

from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.training import Run

__all__ = ["callback_list", "refuse_second_restorer", "training_weights", "warn_of_files_outside"]

# Where callbacks write, and the attribute that says so.
_FILES = {"TensorBoard": "log_dir", "CSVLogger": "filename", "OrbaxCheckpoint": "directory"}


def callback_list() -> keras.callbacks.CallbackList:
    """Return the callbacks of the ``fit`` whose hook is running, which Keras tells none of them.

    Raises:
        TrackingError: the hook is not called as Keras calls it.
    """
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
    raise TrackingError(
        "Received PolyaxonCallback.on_train_begin() without a list of callbacks. Expected the callback in "
        "model.fit(callbacks=[...]) or, in a loop of your own, in a keras.callbacks.CallbackList."
    )


def refuse_second_restorer(callbacks: list[keras.callbacks.Callback]) -> None:
    """Raise where another callback brings the model to a state of its own when training begins.

    Raises:
        TrackingError: there is a ``BackupAndRestore``.
    """
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise TrackingError(
            "Received a BackupAndRestore beside PolyaxonCallback. Expected one of the two: each brings the model to a "
            "state of its own when training begins, and the last one would win. Remove BackupAndRestore, or pass "
            "PolyaxonCallback(resume=False)."
        )


def warn_of_files_outside(callbacks: list[keras.callbacks.Callback], run: Run) -> None:
    """Say whose files go elsewhere than to the outputs of `run`."""
    for callback in callbacks:
        for name, attribute in _FILES.items():
            kind = getattr(keras.callbacks, name, None)  # some are newer than the oldest Keras
            if kind is not None and isinstance(callback, kind):
                path = os.fspath(getattr(callback, attribute))
                example = f'{name}(f"{{polyaxon.outputs_path}}/{os.path.basename(path)}")'
                run.warn_if_outside(path, f"The files of {name}", f"Pass {example}")


@contextlib.contextmanager
def training_weights(callbacks: list[keras.callbacks.Callback]) -> Iterator[bool]:
    """Have the model hold the weights that are trained, where ``SwapEMAWeights`` has put their average: whether it had.

    Training goes on from those; a callback that is new knows nothing of what is swapped. Private names, since there
    are no public ones.
    """
    swapped = [
        callback
        for callback in callbacks
        if isinstance(callback, keras.callbacks.SwapEMAWeights) and callback._ema_weights_in_model  # noqa: SLF001
    ]
    for callback in swapped:
        callback._swap_variables()  # noqa: SLF001
    try:
        yield bool(swapped)
    finally:
        for callback in swapped:
            callback._swap_variables()  # noqa: SLF001
