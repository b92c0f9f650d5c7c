"""The other callbacks of a ``fit``: conflicts with PolyaxonCallback, files outside the outputs, swapped weights."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from polyaxon_keras.epoch_end import epoch_iterator, is_helper
from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polyaxon_tracking.training import Run

__all__ = [
    "build_model",
    "callback_list",
    "fit_callbacks",
    "iterations_of",
    "refuse_second_restorer",
    "set_initial_epoch",
    "stopped_early",
    "training_weights",
    "warn_of_files_outside",
]

# Callbacks that write files, and the attribute that holds the path they write to.
_FILES = {"TensorBoard": "log_dir", "CSVLogger": "filename", "OrbaxCheckpoint": "directory"}


def callback_list() -> keras.callbacks.CallbackList:
    """Return the callback list of the ``fit`` whose hook is running.

    The list is found on the call stack because Keras does not give callbacks access to the list.

    Raises:
        TrackingError: the hook was not called by a ``CallbackList`` of Keras.
    """
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
    raise TrackingError(
        "Received PolyaxonCallback.on_train_begin() without a list of callbacks. Expected the callback in "
        "model.fit(callbacks=[...]) or, in a loop of your own, in a keras.callbacks.CallbackList."
    )


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


def build_model(model: keras.Model) -> None:
    """Build `model` for the batches of the ``fit`` that is running, as Keras itself does on the other backends.

    On TensorFlow, Keras builds the model in the first step, and weights cannot be loaded before that. Only a private
    attribute of Keras gives the types of the batches without consuming a batch.
    """
    if (iterator := epoch_iterator()) is not None:
        batch = iterator._distributed_dataset.element_spec  # noqa: SLF001
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        model(keras.tree.map_structure(_symbolic_tensor, x))


def _symbolic_tensor(spec: Any) -> keras.KerasTensor:
    """Return a symbolic tensor with the shape and dtype of `spec`, but with any batch size."""
    return keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name)


def iterations_of(model: keras.Model) -> int:
    """Return how many steps the optimizer of ``compile`` has done."""
    optimizer = model.optimizer
    return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Let the ``fit`` that is starting begin with `epoch` instead of its argument `initial_epoch`.

    Keras has no public way to do so. Its own ``BackupAndRestore`` sets the same private attribute.
    """
    model._initial_epoch = epoch  # noqa: SLF001
