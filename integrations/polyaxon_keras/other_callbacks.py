"""The other callbacks of a ``fit``: conflicts with PolyaxonCallback, files outside the outputs, swapped weights."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from polyaxon_keras.epoch_end import is_helper
from polyaxon_keras.framework import keras
from polyaxon_keras.running_fit import callback_list
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.training import Run

__all__ = ["fit_callbacks", "refuse_second_restorer", "stopped_early", "training_weights", "warn_of_files_outside"]

# Callbacks that write files, and the attribute that holds the path they write to.
_FILES = {"TensorBoard": "log_dir", "CSVLogger": "filename", "OrbaxCheckpoint": "directory"}


def fit_callbacks() -> list[keras.callbacks.Callback]:
    """Return the callbacks of the ``fit`` whose hook is running, without the helpers of this package."""
    return [callback for callback in callback_list().callbacks if not is_helper(callback)]


def refuse_second_restorer(callbacks: list[keras.callbacks.Callback]) -> None:
    """Raise if another callback also restores the model when training begins.

    Raises:
        TrackingError: `callbacks` contains a ``BackupAndRestore``.
    """
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        raise TrackingError(
            "Received a BackupAndRestore together with a PolyaxonCallback. Expected one of the two: each restores its "
            "own state when training begins, and the last one would win. Remove BackupAndRestore, or pass "
            "PolyaxonCallback(resume=False)."
        )


def stopped_early(callbacks: list[keras.callbacks.Callback]) -> bool:
    """Return whether an ``EarlyStopping`` has ended training.

    Whatever else ends it, such as a time limit, lets training continue at the next start.
    """
    return any(isinstance(one, keras.callbacks.EarlyStopping) and one.stopped_epoch > 0 for one in callbacks)


def warn_of_files_outside(callbacks: list[keras.callbacks.Callback], run: Run) -> None:
    """Warn of each callback that writes files outside the outputs path of `run`."""
    for callback in callbacks:
        for name, attribute in _FILES.items():
            kind = getattr(keras.callbacks, name, None)  # the oldest supported Keras lacks some of these
            if kind is not None and isinstance(callback, kind):
                path = os.fspath(getattr(callback, attribute))
                example = f'{name}(f"{{polyaxon.outputs_path}}/{os.path.basename(path)}")'
                run.warn_if_outside(path, f"The files of {name}", f"Pass {example}")


@contextlib.contextmanager
def training_weights(callbacks: list[keras.callbacks.Callback]) -> Iterator[bool]:
    """Put the trained weights back in the model within the ``with`` block, if ``SwapEMAWeights`` has replaced them.

    The trained weights must be saved instead of their averages, because training resumes from the trained weights and a
    new ``SwapEMAWeights`` does not know that weights were swapped. Keras has only private
    attributes and methods for the swap.

    Yields:
        Whether averages were in the model.
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
