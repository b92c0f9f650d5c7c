"""The callback that a user adds to ``model.fit``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from polyaxon_keras.framework import keras
from polyaxon_keras.other_callbacks import fit_callbacks, refuse_second_restorer, warn_of_files_outside
from polyaxon_keras.training import Training
from polyaxon_tracking import TrackingError, atomic_write
from polyaxon_tracking.training import Run, RunPaths, SaveOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from polyaxon_tracking.training import IfChanged

__all__ = ["PolyaxonCallback"]

_logger = logging.getLogger("polyaxon_tracking")

# The loggers of Keras and its backends. Not torch's logger, which at INFO logs about its compiler even if unused.
_KERAS_LOGGERS = ["keras", "absl", "tensorflow", "jax"]


class PolyaxonCallback(keras.callbacks.ModelCheckpoint, RunPaths):
    """A ``ModelCheckpoint`` that saves to the run's outputs path and resumes training after the pod was killed.

    The model is saved to ``<outputs>/checkpoints``, whenever ``ModelCheckpoint`` would save it and with the same
    options. A checkpoint of the whole training state is also saved, to ``<outputs>/checkpoints/resume``, at the end of
    every epoch. In a run of the platform, ``model.fit`` resumes from the newest intact checkpoint. Elsewhere, ``fit``
    resumes only if `resume` is ``True``, and each start has its own outputs path, ``./outputs/version_N``.

    Args:
        filepath: name of the model's file below ``<outputs>/checkpoints``, with the same placeholders as in
            ``ModelCheckpoint``. An absolute path is used unchanged. The default is ``best.keras`` with
            `save_best_only`, otherwise ``model.keras``. With `save_weights_only`, the default ends in ``.weights.h5``
            instead.
        monitor: name of the metric that decides which model is the best. This option and those up to
            `initial_value_threshold` are the same as in ``ModelCheckpoint``, and concern only the model's file.
        verbose: 1 to log each save of the model's file, or 0.
        save_best_only: whether to save the model only if `monitor` has improved.
        save_weights_only: whether to save only the model's weights instead of the whole model.
        mode: whether `monitor` improves when it falls (``"min"``) or when it rises (``"max"``). With ``"auto"``, Keras
            decides by the metric.
        save_freq: ``"epoch"`` to save the model after every epoch, or a number of batches.
        initial_value_threshold: the value that `monitor` must improve on for the first save.
        datasets: names of the datasets that training needs, or a mapping from each name to its path on this machine.
            The mapping's paths are used only if the environment names no data. `data_path` returns the path of each.
        resume: ``True`` resumes from the newest intact checkpoint, outside a run from that in the newest ``version_N``
            with checkpoints. ``False`` starts from scratch. By default, only a run resumes.
        if_changed: what to do if the script's hyperparameters differ from those saved with the checkpoint: ``"warn"``
            resumes and logs both values, ``"raise"`` raises, and ``"restart"`` starts from scratch and keeps the
            checkpoint. The number of epochs may always change.
        name: the name of this training, such as ``"fold-3"``, if the script trains several times. The checkpoints of a
            named training, its best models included, are in ``<outputs>/checkpoints/<name>``, whatever trainings came
            before it in the script.
        restore: other callbacks given to ``fit`` whose state is saved and restored together with the training state,
            such as ``EarlyStopping`` and ``ReduceLROnPlateau``. Keras lets all other callbacks start from scratch when
            training resumes.
        every_n_train_steps: number of batches after which to save the training state, in addition to the end of every
            epoch. The state is saved after a batch in which a multiple of this number was reached or passed. Keras
            cannot resume in the middle of an epoch: the interrupted epoch starts over, with the weights that were saved
            within the epoch. With ``"auto"``, the state is saved as often as costs 1% of the time.
        train_time_interval: time after which to save the training state again, in addition to the end of every epoch.
        max_to_keep: number of the newest training states to keep. Older training states are deleted. By default, two
            are kept while training runs, and one once it has ended.
        keep_every_n_epochs: keep the first training state at or after each multiple of this number of epochs for good.
        keep_every: keep the first training state for good, and then the first one whenever this time has passed since.
        loggers: names of more loggers whose level is set by ``POLYAXON_LOG_LEVEL``. That variable also sets the level
            of Keras's loggers and of this package's logger.
        background: whether to write files in a background thread while training continues, from a copy of the state
            in memory. A file then appears under its name shortly after its step, and every file is written when ``fit``
            returns. With ``False``, training waits while a file is written.
        write_timeout: maximum time that the end of training waits for pending writes, and that a save waits for the
            write of the previous save. An error is raised after that time.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, an environment variable
            is malformed, or an argument is out of range.

    Examples:
        >>> polyaxon = PolyaxonCallback(monitor="val_loss", save_best_only=True, datasets={"digits": "."})
        >>> os.path.relpath(polyaxon.filepath)
        'outputs/version_0/checkpoints/best.keras'
        >>> polyaxon.data_path("digits")
        '.'
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str] | None = None,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]] = (),
        resume: bool | None = None,
        if_changed: IfChanged = "warn",
        name: str | None = None,
        restore: Iterable[keras.callbacks.Callback] = (),
        every_n_train_steps: int | Literal["auto"] | None = None,
        train_time_interval: timedelta | None = None,
        max_to_keep: int | None = None,
        keep_every_n_epochs: int | None = None,
        keep_every: timedelta | None = None,
        loggers: Iterable[str] = (),
        background: bool = True,
        write_timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if filepath is None:
            filepath = ("best" if save_best_only else "model") + (".weights.h5" if save_weights_only else ".keras")
        self._options = SaveOptions(
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            max_to_keep=max_to_keep,
            keep_every_n_epochs=keep_every_n_epochs,
            keep_every=keep_every,
            background=background,
            write_timeout=write_timeout,
        )
        self._callbacks_to_restore = _checked_restore(restore)
        self._run = Run(
            datasets=datasets,
            loggers=loggers,
            framework_loggers=_KERAS_LOGGERS,
            resume=resume,
            if_changed=if_changed,
            name=name,
            writes_in_place=True,
        )
        path = self._run.checkpoint_path(filepath)
        below = self._run.checkpoints_path
        if path.startswith(below):  # braces are placeholders only in the file's name
            path = below.replace("{", "{{").replace("}", "}}") + path[len(below) :]
        super().__init__(
            path,
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        self._resume = resume
        self._training: Training | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the newest training state, or start from scratch.

        Raises:
            TrackingError: there are checkpoints but none is intact, or the model differs from the saved model.
        """
        super().on_train_begin(logs)
        others = fit_callbacks()
        if self._resume is not False:
            refuse_second_restorer(others)
        self._training = Training(self, self._run, self._options, self._callbacks_to_restore)
        if self._run.on_cluster and self._training.session.is_writer:
            warn_of_files_outside(others, self._run)
        self._training.begin()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the batch counter, and restore the state of the callbacks in `restore`."""
        super().on_epoch_begin(epoch, logs)
        if self._training is not None:
            self._training.begin_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save or stop if `save_freq`, `every_n_train_steps`, `train_time_interval` or a signal asks for it."""
        if self._training is not None:
            self._training.writer.variables_may_have_changed()
        super().on_train_batch_end(batch, logs)
        if self._training is not None:
            self._training.end_batch(batch, logs or {})

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stop if a signal was received during the validation within ``fit``."""
        if self._training is not None:
            self._training.end_validation_batch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the model as ``ModelCheckpoint`` does, and then the training state."""
        if self._training is not None:
            self._training.writer.variables_may_have_changed()
        super().on_epoch_end(epoch, logs)
        # With `restore`, the state is saved only after all those callbacks were notified too.
        if self._training is not None and not self._callbacks_to_restore:
            self._training.save_at_epoch_end(epoch, logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Mark this training as finished, and exit if a signal was received after its last batch.

        The next training saves its own checkpoints, even if it trains the same model.
        """
        super().on_train_end(logs)
        if self._training is not None:
            self._training.finish()
            self._training = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the running training, because a copy of this callback has no part in it."""
        return vars(self) | {"_training": None}

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        """Save the model's file as ``ModelCheckpoint`` does, but atomically.

        This overrides a private method of Keras. That method writes in place, so that a kill would leave no file that
        can be loaded. Keras has no public hook between the decision to save and the write.
        """
        path = self._get_file_path(epoch, batch, logs)
        if self._training is None or not self._should_save_model(epoch, batch, logs, path):
            return
        model = self.model

        def write() -> None:
            with atomic_write(path) as staged:
                if self.save_weights_only:
                    model.save_weights(staged, overwrite=True)
                else:
                    model.save(staged, overwrite=True)
            if self.verbose > 0:
                _logger.info("Epoch %d: saved the model to %s", epoch + 1, path)

        self._training.writer.write(path, model, write)


def _checked_restore(restore: object) -> list[keras.callbacks.Callback]:
    """Return `restore` as a list; raise if it is not a list of callbacks."""
    expected = "Expected a list of callbacks that `fit` is given too, such as restore=[early_stopping]"
    if isinstance(restore, str) or not isinstance(restore, Iterable):
        raise TrackingError(f"Received restore={restore!r}. {expected}.")
    callbacks = list(restore)
    if wrong := [item for item in callbacks if not isinstance(item, keras.callbacks.Callback)]:
        raise TrackingError(f"Received restore={wrong!r}. {expected}.")
    return callbacks
