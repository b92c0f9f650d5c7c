"""The ``fit`` that is running: its callbacks, the types of its batches, its steps and the epoch that it begins with."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from polyaxon_keras.framework import keras
from polyaxon_tracking import TrackingError

__all__ = ["build_model", "callback_list", "epoch_iterator", "iterations_of", "set_initial_epoch"]


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


def epoch_iterator() -> Any:
    """Return the iterator over the batches of the ``fit`` that is running, or ``None`` outside of a ``fit``.

    Keras keeps the iterator in a local variable, so it is found on the call stack.
    """
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if "epoch_iterator" in frame.f_locals:
            return frame.f_locals["epoch_iterator"]
    return None


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
