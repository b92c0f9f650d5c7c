"""Load a training state into a Trainer, which has chosen its `ckpt_path` before any callback's hook."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import traceback
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.checkpoint_io import DurableCheckpointIO, training_state_io
from polyaxon_lightning.framework import pl
from polyaxon_torch import differing_shapes, refused_state
from polyaxon_tracking.training import different_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import Strategy

    from polyaxon_lightning.checkpoint_io import TrainingStateIO
    from polyaxon_tracking import Checkpoint

__all__ = [
    "ckpt_path_argument",
    "is_chosen_by_lightning",
    "is_newer",
    "load",
    "loaded_step",
    "restore",
    "take_over_files",
]

_logger = logging.getLogger("polyaxon_tracking")


def load(
    trainer: pl.Trainer,
    io: TrainingStateIO,
    checkpoint: Checkpoint,
    accept: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> bool:
    """Load `checkpoint` with `io`, and make the Trainer restore everything from it.

    Args:
        trainer: the Trainer.
        io: the input and output of training states.
        checkpoint: the checkpoint.
        accept: takes the loaded state, and returns whether to resume from it.

    Returns:
        Whether the state was accepted.

    Raises:
        TrackingError: the checkpoint holds more than `io` may load. If the model's shapes differ from the saved shapes,
            Lightning's later load of the weights raises a ``TrackingError``.
    """
    if isinstance(trainer.precision_plugin, pl.plugins.precision.DoublePrecision):
        # Lightning converts only after it has restored the weights, which would round them.
        trainer.precision_plugin.convert_module(trainer.lightning_module)
    try:
        with training_state_io(trainer, io):
            state = _hand_over(trainer, checkpoint.path)
    except pickle.UnpicklingError as error:
        raise refused_state(checkpoint.source, error, "PolyaxonCallback") from error
    if not accept(state):
        _take_back(trainer)
        return False
    if not trainer.strategy.restore_checkpoint_after_setup:  # such a strategy loads later, and compares shapes itself
        _check_shapes_when_loaded(trainer.strategy, state, checkpoint.source)
    return True


def restore(trainer: pl.Trainer) -> None:
    """Restore the loaded checkpoint now, because the Trainer has just restored another one."""
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.restore_model()
    connector.restore_datamodule()
    connector.restore_callbacks()


def take_over_files(trainer: pl.Trainer, source: str) -> None:
    """Make each ModelCheckpoint's restored state in `source` and the files in its directory agree.

    It forgets the files that its state names and that no longer exist. Those that were saved after the state are
    replaced, or removed later.
    """
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, DurableCheckpointIO):
        return
    if trainer.is_global_zero:
        io.resume(trainer.checkpoint_callbacks)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint):
            named = sorted({*callback.best_k_models, callback.best_model_path} - {""})
            missing = trainer.strategy.broadcast(io.missing(named) if trainer.is_global_zero else None)
            if missing:
                _forget(callback, missing)
                _logger.warning(
                    "%s names %s, which no longer exists. The best model is now %s",
                    source,
                    ", ".join(missing),
                    callback.best_model_path or "the next that is saved",
                )


def _forget(callback: ModelCheckpoint, files: list[str]) -> None:
    models = callback.best_k_models
    for file in files:
        models.pop(file, None)
    if callback.best_model_path in files:
        callback.best_model_path, callback.best_model_score = "", None
    if models:
        best, worst = (min, max) if callback.mode == "min" else (max, min)
        callback.best_model_path = best(models, key=models.__getitem__)
        callback.best_model_score = models[callback.best_model_path]
        callback.kth_best_model_path = worst(models, key=models.__getitem__)
        callback.kth_value = models[callback.kth_best_model_path]


def is_chosen_by_lightning(trainer: pl.Trainer, argument: Any) -> bool:
    """Return whether Lightning itself chose `ckpt_path`: what an ``OnExceptionCheckpoint`` or Slurm's requeue saved.

    Args:
        trainer: the Trainer.
        argument: the `ckpt_path` that ``fit`` was called with.
    """
    on_exception = pl.callbacks.OnExceptionCheckpoint
    has_one = any(isinstance(callback, on_exception) for callback in trainer.checkpoint_callbacks)
    return (has_one or _is_of_slurm(trainer)) and argument is None


def is_newer(trainer: pl.Trainer, checkpoint: Checkpoint) -> bool:
    """Return whether to resume from what Lightning itself chose, because it is newer than `checkpoint`.

    What an ``OnExceptionCheckpoint`` saved may have been saved in the middle of an optimizer step, and is never used.
    """
    return _is_of_slurm(trainer) and loaded_step(trainer) > checkpoint.step


def loaded_step(trainer: pl.Trainer) -> int:
    """Return the number of steps in the checkpoint that the Trainer has loaded."""
    step: int = trainer._checkpoint_connector._loaded_checkpoint["global_step"]  # noqa: SLF001
    return step


def _is_of_slurm(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer loads what Lightning saves when Slurm requeues a job."""
    return os.path.basename(trainer.ckpt_path or "").startswith("hpc_ckpt_")


def ckpt_path_argument(trainer: pl.Trainer) -> Any:
    """Return the `ckpt_path` argument of the running ``trainer.fit``, which Lightning stores nowhere.

    In a process that was launched by ``fit``, there is none.
    """
    for frame, _ in traceback.walk_stack(sys._getframe()):  # noqa: SLF001
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
    return None


def _hand_over(trainer: pl.Trainer, path: str) -> dict[str, Any]:
    """Load the checkpoint `path` into the Trainer's connector, which restores everything in its own order.

    These names are private, because no public name will do: ``Trainer.fit`` chooses its `ckpt_path` before any hook is
    called. It asks an ``OnExceptionCheckpoint`` for a path, but then ``ckpt_path=None`` means ``"last"`` for every
    ``ModelCheckpoint`` too, in every fit, and modification times choose among the files.
    """
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.resume_start(path)
    state: dict[str, Any] = connector._loaded_checkpoint  # noqa: SLF001
    return state


def _take_back(trainer: pl.Trainer) -> None:
    """Undo `_hand_over`, so that the Trainer restores nothing."""
    connector = trainer._checkpoint_connector  # noqa: SLF001
    connector.resume_start(None)
    connector._loaded_checkpoint = {}  # noqa: SLF001


def _check_shapes_when_loaded(strategy: Strategy, state: dict[str, Any], source: str) -> None:
    """Make Lightning's load raise an error with both shapes if the model's tensors differ in shape from `state`.

    Before `state` is loaded nothing can be compared: lazy layers have no shapes, and models may build themselves in
    ``configure_model``, or change the state in ``on_load_checkpoint``. No hook comes after loading.
    """

    def load_model_state_dict(checkpoint: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        del strategy.load_model_state_dict
        error = None
        try:
            strategy.load_model_state_dict(checkpoint, *arguments, **options)
        except RuntimeError as caught:
            error = caught
        module = strategy.lightning_module
        assert module is not None
        mine = checkpoint is state  # and not the checkpoint of the user's `ckpt_path`
        if mine and (differing := differing_shapes(module, state["state_dict"])):
            # Torch's error lists all shapes again; it is only needed if names differ too.
            same_names = module.state_dict().keys() == state["state_dict"].keys()
            raise different_model(source, differing) from (None if same_names else error)
        if error is not None:
            raise error

    strategy.load_model_state_dict = load_model_state_dict  # type: ignore[method-assign]
