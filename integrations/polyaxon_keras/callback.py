"""The callback that a user adds to ``model.fit``."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from datetime import timedelta
from signal import Signals
from typing import TYPE_CHECKING, Any

import numpy as np

from polyaxon_keras import training_state
from polyaxon_keras.epoch_end import (
    MissedEpochEnd,
    NotifyAfterEpochEnd,
    NotifyBeforeEpochEnd,
    StateBeforeEpochEnd,
    averages_on_exception,
    is_helper,
)
from polyaxon_keras.fit_hooks import callback_list, refuse_second_restorer, training_weights, warn_of_files_outside
from polyaxon_keras.framework import keras
from polyaxon_keras.process_group import JaxProcessGroup
from polyaxon_keras.snapshot import Snapshot, substituted_values
from polyaxon_tracking import CheckpointManager, PreemptionHandler, TrackingError, atomic_write
from polyaxon_tracking.training import Flags, Run, SaveOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType, TracebackType
    from typing import NoReturn

__all__ = ["PolyaxonCallback"]

_logger = logging.getLogger("polyaxon_tracking")

# The loggers of Keras and its backends. Not torch's logger, which at INFO logs about its compiler even if unused.
_KERAS_LOGGERS = ["keras", "absl", "tensorflow", "jax"]


class PolyaxonCallback(keras.callbacks.ModelCheckpoint):
    """A ``ModelCheckpoint`` that saves to the run's outputs path and resumes training after the pod was killed.

    The model is saved to ``<outputs>/checkpoints``, whenever ``ModelCheckpoint`` would save it and with the same
    options. A checkpoint of the whole training state is also saved, to ``<outputs>/checkpoints/resume``, at the end of
    every epoch. In a run of the platform, ``model.fit`` resumes from the newest intact checkpoint. Elsewhere, the
    outputs path is ``./outputs``, and ``fit`` resumes only if `resume` is ``True``.

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
        resume: whether to resume from the newest intact checkpoint (``True``) or to start from scratch (``False``). By
            default, training resumes only in a run of the platform.
        restore: other callbacks given to ``fit`` whose state is saved and restored together with the training state,
            such as ``EarlyStopping`` and ``ReduceLROnPlateau``. Keras lets all other callbacks start from scratch when
            training resumes.
        every_n_train_steps: number of batches after which to save the training state, in addition to the end of every
            epoch. The state is saved after a batch in which a multiple of this number was reached or passed. Keras
            cannot resume in the middle of an epoch: the interrupted epoch starts over, with the weights that were saved
            within the epoch.
        train_time_interval: time after which to save the training state again, in addition to the end of every epoch.
        max_to_keep: number of the newest training states to keep. Older training states are deleted.
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
        'outputs/checkpoints/best.keras'
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
        restore: Iterable[keras.callbacks.Callback] = (),
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        max_to_keep: int = 2,
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
            background=background,
            write_timeout=write_timeout,
        )
        self._callbacks_to_restore = list(restore)
        wrong = [item for item in self._callbacks_to_restore if not isinstance(item, keras.callbacks.Callback)]
        if wrong:
            raise TrackingError(f"Received restore={wrong!r}. Expected a list of callbacks that `fit` is given too.")
        self._run = Run(datasets=datasets, loggers=[*_KERAS_LOGGERS, *loggers], resume=resume)
        path = self._run.checkpoint_path(os.fspath(filepath))
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
        self._snapshot: Snapshot | None = None
        self._process_group = JaxProcessGroup()
        self._fit_callbacks: list[keras.callbacks.Callback] = []
        self._resume = resume
        self._should_reserve_memory = True
        self._unchanged_since_save = False
        self._checkpoints = CheckpointManager(self._run.checkpoints_path, max_to_keep)  # replaced when training begins
        self._epoch = 0
        self._batch = -1
        self._step = 0
        self._saved_step = 0
        self._saved_at = 0.0
        self._preemption = PreemptionHandler(self._is_training)
        self._excepthook = sys.excepthook
        self._optimizer_is_stepping = False
        self._iterations_at_start = 0
        self._fitted_model: keras.Model | None = None
        self._callback_states: list[dict[str, Any]] = []
        self._logs: dict[str, Any] = {}
        self._before_epoch_end: StateBeforeEpochEnd | None = None
        """The state before the end of the epoch, until every callback was notified of that end."""
        self._step_saved_before_epoch_end = -1
        self._flags_for_epoch_end = Flags()
        self._should_check_for_swap = False
        self._validation_swaps_weights = False

    @property
    def outputs_path(self) -> str:
        """The path or URL to which this run's outputs are saved."""
        return self._run.outputs_path

    def data_path(self, name: str) -> str:
        """Return the path of the dataset `name`, which must be in `datasets`.

        Raises:
            TrackingError: `name` is not in `datasets`.
        """
        return self._run.data_path(name)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the newest training state, or start from scratch.

        Raises:
            TrackingError: there are checkpoints but none is intact, or the model differs from the saved model.
        """
        super().on_train_begin(logs)
        callbacks = callback_list()
        self._fit_callbacks = [callback for callback in callbacks.callbacks if not is_helper(callback)]
        starts, done = NotifyBeforeEpochEnd(self._on_epoch_end_starts), NotifyAfterEpochEnd(self._on_epoch_end_done)
        callbacks.callbacks = [starts, *self._fit_callbacks, done]
        if self._resume is not False:
            refuse_second_restorer(self._fit_callbacks)
        self._process_group = JaxProcessGroup()
        if self._run.on_cluster and self._process_group.rank == 0:
            warn_of_files_outside(self._fit_callbacks, self._run)
        if self._options.background and self._snapshot is None and self._process_group.rank == 0:
            self._snapshot = Snapshot(self._options.write_timeout)
        self._checkpoints = self._run.checkpoint_manager(self.model, max_to_keep=self._options.max_to_keep)
        self._step = self._saved_step = 0
        self._should_reserve_memory = True
        self._saved_at = time.monotonic()
        self._callback_states, self._logs = [], {}
        self._before_epoch_end, self._step_saved_before_epoch_end = None, -1
        self._validation_swaps_weights = False
        self._flags_for_epoch_end = Flags()
        self._fitted_model = self.model
        _uninstall_hooks_of_failed_fits()
        self._preemption.install()
        if sys.excepthook != self._save_after_exception:
            self._excepthook, sys.excepthook = sys.excepthook, self._save_after_exception
        self._track_optimizer_steps()
        self._iterations_at_start = self._iterations()
        newest = self._process_group.latest(self._checkpoints) if self._run.should_resume else None
        if newest is None:
            _logger.info("Starting fresh: %s", self._run.why_fresh(self._checkpoints))
            return
        if not newest.path.endswith(".weights.h5"):
            raise TrackingError(
                f"Received {newest.source}, which Keras did not save. Expected an outputs path with checkpoints of "
                f"Keras alone: use another outputs path for this training."
            )
        training = training_state.load(
            self.model, newest.path, newest.source, self._process_group.rank, build=self._build_model
        )
        self._checkpoints.release()
        self.best = training["best"]
        self._callback_states = training["callbacks"]
        if len(self._callback_states) != len(self._callbacks_to_restore):
            raise TrackingError(
                f"Received {len(self._callbacks_to_restore)} callbacks to restore, while {newest.source} holds the "
                f"state of {len(self._callback_states)}. Expected the same callbacks in the same order. Give `restore` "
                f"what it was given before, or pass PolyaxonCallback(resume=False) to begin anew; the checkpoint stays "
                f"as it is."
            )
        self._validation_swaps_weights = training.get("swaps", False)
        if missed := training.get("missed"):
            self._logs = missed["logs"]
            MissedEpochEnd(self.model, callbacks, missed)
            self._step_saved_before_epoch_end = newest.step
        self._step = self._saved_step = newest.step
        self._iterations_at_start = self._iterations() - newest.step
        _set_initial_epoch(self.model, newest.epoch)
        _logger.info("Resuming from %s: epoch %d, step %d", newest.source, newest.epoch, newest.step)
        if newest.epoch >= self.params["epochs"]:
            _logger.info("This training had come to its end (epochs=%d): nothing is left", self.params["epochs"])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the batch counter and restore the state of the callbacks in `restore`."""
        self._unchanged_since_save = False
        super().on_epoch_begin(epoch, logs)
        self._restore_callbacks()
        self._epoch, self._batch, self._before_epoch_end = epoch, -1, None

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save if `save_freq`, `every_n_train_steps` or `train_time_interval` requires it or a signal was received."""
        self._unchanged_since_save = False
        super().on_train_batch_end(batch, logs)
        if self.params["steps"] is not None:  # the last execution of `steps_per_execution` may have fewer batches
            batch = min(batch, self.params["steps"] - 1)
        self._step += batch - self._batch
        self._batch, self._logs = batch, logs or {}
        if self._should_reserve_memory:
            self._reserve_memory()
        flags = self._exchange_flags()
        if self._options.should_save(step=self._step, saved_step=self._saved_step):
            flags = flags._replace(save=True)
        if self._batch + 1 == self.params["steps"]:
            self._flags_for_epoch_end = flags  # acted on at the end of the epoch, which follows this batch
        else:
            self._act_on_flags(flags)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save and exit if a signal was received during the validation within ``fit``.

        If the model's weights differ from those before the validation, the exit is delayed until the validation ends,
        unless the state was saved before the validation.
        """
        signal_number = self._exchange_flags().signal
        if self._should_check_for_swap:
            self._should_check_for_swap = False
            self._validation_swaps_weights = self._validation_swaps_weights or not self._has_weights_before_epoch_end()
        if not signal_number or self._before_epoch_end is None:
            return
        if self._step_saved_before_epoch_end == self._step or self._has_weights_before_epoch_end():
            self._unchanged_since_save = False
            self._save_and_exit(signal_number)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the model as ``ModelCheckpoint`` does, and then the training state."""
        self._unchanged_since_save = False
        super().on_epoch_end(epoch, logs)
        if not self._callbacks_to_restore:  # otherwise save only after all callbacks in `restore` were notified
            self._save_at_epoch_end(epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Mark this training as finished, and exit if a signal was received after its last batch.

        The next training saves its own checkpoints, even if it trains the same model.
        """
        self._unchanged_since_save = False
        super().on_train_end(logs)
        self._restore_callbacks()
        epochs = self.params["epochs"]
        if self.model.stop_training and self._epoch + 1 < epochs:
            self._save_training(epochs)  # stopped early: resuming must not train further epochs
        self._wait_for_writes()
        self._snapshot = None  # frees its memory
        self._preemption.uninstall()
        if sys.excepthook == self._save_after_exception:  # otherwise other code has replaced the hook since
            sys.excepthook = self._excepthook
        for optimizer in training_state.optimizers_of(self.model).values():
            vars(optimizer).pop("apply", None)
        _set_initial_epoch(self.model, None)
        self._run.mark_finished(self._checkpoints)
        self._process_group.exit_if_requested(self._preemption)

    def _exchange_flags(self) -> Flags:
        """Return the flags of this process, or the combined flags of all processes.

        With several processes, the combined flags are those of the previous batch.
        """
        save_due = self._options.is_interval_over(seconds_since_save=time.monotonic() - self._saved_at)
        signal_number = self._preemption.requested or 0
        if not self._process_group.is_distributed:
            return Flags(signal_number, save_due)
        failed = self._snapshot is not None and self._snapshot.failed
        save_due = self._process_group.rank == 0 and save_due  # only the clock of rank 0 counts
        flags = self._process_group.reduce_flags(Flags(signal_number, save_due, failed))
        if flags.failed:
            self._wait_for_writes()
        return flags

    def _act_on_flags(self, flags: Flags) -> None:
        if flags.signal:
            self._save_and_exit(flags.signal)
        if flags.save:
            self._save_within_epoch()

    def _save_and_exit(self, signal_number: int) -> NoReturn:
        """Save and exit because one of the processes received the signal `signal_number`."""
        if self._step_saved_before_epoch_end != self._step:
            self._save_within_epoch()
        self._exit_after_signal(signal_number)

    def _exit_after_signal(self, signal_number: int) -> NoReturn:
        self._wait_for_writes()
        if self._process_group.rank == 0:
            _logger.warning("Saved step %d after %s", self._step, Signals(signal_number).name)
        self._preemption.exit(signal_number)

    def _on_epoch_end_starts(self) -> None:
        """Keep the state before the end of the epoch, and save it if earlier validations have swapped weights."""
        if self._before_epoch_end is None:
            self._unchanged_since_save = False
            self._before_epoch_end = self._state_before_epoch_end()
            self._should_check_for_swap = not self._process_group.is_distributed
            flags, self._flags_for_epoch_end = self._flags_for_epoch_end, Flags()
            is_saved = self._step_saved_before_epoch_end == self._step
            self._act_on_flags(flags._replace(save=flags.save or (self._validation_swaps_weights and not is_saved)))

    def _save_at_epoch_end(self, epoch: int) -> None:
        """Save the training state of the finished epoch, unless it is saved already."""
        if self._before_epoch_end is not None:
            self._before_epoch_end = None
            self._save_training(epoch + 1)

    def _on_epoch_end_done(self, epoch: int) -> None:
        """Do the save that was delayed until every callback was notified, and the exit that a signal requested."""
        self._unchanged_since_save = False
        self._save_at_epoch_end(epoch)
        signal_number = self._preemption.requested
        if signal_number and not self._process_group.is_distributed:
            self._exit_after_signal(signal_number)

    def _state_before_epoch_end(self) -> StateBeforeEpochEnd:
        # A process cannot read the parts of sharded weights that other processes hold.
        sample_weights = not self._process_group.is_distributed
        return StateBeforeEpochEnd(self.model, self._logs, self._training_values(), sample_weights=sample_weights)

    def _has_weights_before_epoch_end(self) -> bool:
        """Return whether the weights equal those before the end of the epoch.

        With several processes, return ``True``: no process can read all weights.
        """
        with training_weights(self._fit_callbacks):
            before = self._before_epoch_end
            return before is None or before.has_weights_of(self.model)

    def _is_training(self, frame: FrameType | None) -> bool:
        """Return whether `frame` is within the ``fit`` of this callback's model.

        Frames are searched because Keras notifies no callback if an exception ends ``fit``.
        """
        while frame is not None:
            if self._is_fit(frame):
                return True
            frame = frame.f_back
        return False

    def _is_fit(self, frame: FrameType) -> bool:
        # Keras removes its own frames from a traceback, except the frame of the wrapper that removes them.
        arguments, name = frame.f_locals, frame.f_code.co_name
        if name == "error_handler" and arguments.get("args"):
            return arguments["args"][0] is self._fitted_model and arguments["fn"].__name__ == "fit"
        return name == "fit" and arguments.get("self") is self._fitted_model

    def _save_after_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Save the steps since the last save if an exception in ``fit`` ends the process.

        This is an excepthook of the interpreter because Keras notifies no callback of an exception.
        """
        self._excepthook(kind, error, trace)
        frames = [frame for frame, _ in traceback.walk_tb(trace)]
        if not any(map(self._is_fit, frames)) or self._optimizer_is_stepping:
            return
        if self._process_group.is_distributed:  # saving takes all processes, and the others may have no exception
            return
        self._unchanged_since_save = False
        if self._iterations() - self._iterations_at_start == self._step + 1:  # raised before this callback's hook
            self._step, self._batch = self._step + 1, self._batch + 1
            self._logs = self.model.get_metrics_result()
        if self._step == self._saved_step:
            return
        if averages_on_exception(self.model.optimizer) or not self._has_weights_before_epoch_end():
            _logger.warning(
                "Step %d is not saved: other weights are in the model, such as averages. What was there before is as "
                "it was",
                self._step,
            )
            return
        try:
            self._save_within_epoch()
            self._wait_for_writes()
        except (OSError, RuntimeError, TrackingError) as failure:
            _logger.error(  # noqa: TRY400  # the traceback of the exception has just been printed
                "The state at the exception was not saved; what was there before is as it was: %s", failure
            )
        else:
            _logger.warning("Saved step %d after %s", self._step, kind.__name__)

    def _track_optimizer_steps(self) -> None:
        """Record whether an optimizer step is in progress, because the state is inconsistent until the step is done.

        JAX needs no such record, because there the model's variables all change together after the whole step.
        """
        self._optimizer_is_stepping = False
        if keras.backend.backend() != "jax":
            for optimizer in training_state.optimizers_of(self.model).values():
                self._track_steps_of(optimizer)

    def _track_steps_of(self, optimizer: keras.optimizers.Optimizer) -> None:
        vars(optimizer).pop("apply", None)  # left by a training that an exception has ended
        apply = optimizer.apply

        def tracked_apply(*arguments: Any, **options: Any) -> Any:
            self._optimizer_is_stepping = True
            result = apply(*arguments, **options)
            self._optimizer_is_stepping = False
            return result

        optimizer.apply = tracked_apply

    def _build_model(self) -> None:
        """Build the model for the batches of this ``fit``, as Keras itself does on the other backends.

        On TensorFlow, Keras builds the model in the first step, and weights cannot be loaded before that. Only a local
        variable of ``fit`` and a private attribute of Keras give the types of the batches without consuming a batch.
        """
        frame: FrameType | None = sys._getframe()  # noqa: SLF001
        while frame is not None and "epoch_iterator" not in frame.f_locals:
            frame = frame.f_back
        if frame is not None:
            batch = frame.f_locals["epoch_iterator"]._distributed_dataset.element_spec  # noqa: SLF001
            x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
            self.model(keras.tree.map_structure(_symbolic_tensor, x))

    def _iterations(self) -> int:
        optimizer = self.model.optimizer
        return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))

    def _restore_callbacks(self) -> None:
        # Callbacks reset themselves in `on_train_begin`, so their state is restored after that hook of every callback.
        if self._callback_states:
            for callback, state in zip(self._callbacks_to_restore, self._callback_states, strict=True):
                vars(callback).update(state)
            self._callback_states = []

    def _training_values(self) -> dict[str, Any]:
        best = None if self.best is None else float(self.best)
        callbacks = [_callback_state(callback) for callback in self._callbacks_to_restore]
        return {"best": best, "callbacks": callbacks, "swaps": self._validation_swaps_weights}

    def _save_within_epoch(self) -> None:
        """Save the current state or, at the end of the epoch, the state before that end."""
        before = self._before_epoch_end
        if before is None and self._batch + 1 == self.params["steps"]:
            before = self._state_before_epoch_end()
        self._save_training(self._epoch, before)

    def _save_training(self, epoch: int, before: StateBeforeEpochEnd | None = None) -> None:
        model, checkpoints, step = self.model, self._checkpoints, self._step
        training, random = self._training_values(), training_state.random_state()
        if before is not None:
            training, random = before.training, before.random
        metadata = training_state.make_metadata(model, training, self._process_group.gather(random))
        if before is not None:
            metadata["generators"] = before.generators
            self._step_saved_before_epoch_end = step

        def write() -> None:
            with checkpoints.save(step, epoch, suffix=".weights.h5") as path:
                training_state.save(model, path, metadata)

        with training_weights(self._fit_callbacks) as swapped:
            self._unchanged_since_save = self._unchanged_since_save and not swapped
            self._write_on_first_rank(f"step {step} to {checkpoints.directory}", write)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _write_on_first_rank(self, what: str, write: Callable[[], None]) -> None:
        whole_values = self._process_group.gather_variables(self.model)
        with self._process_group.rank_0_writes() as is_writer:
            if is_writer:
                self._write_in_this_process(what, write, whole_values)

    def _write_in_this_process(self, what: str, write: Callable[[], None], whole_values: list[tuple[Any, Any]]) -> None:
        try:
            if whole_values:
                with substituted_values(whole_values):
                    write()
            elif self._snapshot is None:
                write()
            else:
                self._snapshot.save(what, self.model, write, unchanged=self._unchanged_since_save)
                self._unchanged_since_save = True
        except OSError:
            self._saved_step = self._step  # the disk fails: a second save after the exception would fail too
            raise

    def _wait_for_writes(self) -> None:
        """Wait until every file is written, and raise the error of a failed write in all processes."""
        with self._process_group.share_errors():
            if self._snapshot is not None:
                self._snapshot.wait()

    def _reserve_memory(self) -> None:
        """Allocate the memory for copies of the state, whose variables all exist after the first batch."""
        self._should_reserve_memory = False
        if self._snapshot is not None and not self._process_group.is_sharded(self.model):
            self._snapshot.reserve(self.model)

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any] | None) -> None:
        """Save the model's file as ``ModelCheckpoint`` does, but atomically.

        This overrides a private method of Keras. That method writes in place, so that a kill would leave no file that
        can be loaded. Keras has no public hook between the decision to save and the write.
        """
        path = self._get_file_path(epoch, batch, logs)
        if not self._should_save_model(epoch, batch, logs, path):
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

        self._write_on_first_rank(path, write)


def _uninstall_hooks_of_failed_fits() -> None:
    """Uninstall the excepthook and signal handlers of fits whose exception was caught.

    Otherwise the excepthook and the handlers would keep the models of those fits in memory.
    """
    while True:
        callback = getattr(sys.excepthook, "__self__", None)
        if not isinstance(callback, PolyaxonCallback) or callback._is_training(sys._getframe()):  # noqa: SLF001
            return
        sys.excepthook = callback._excepthook  # noqa: SLF001
        callback._preemption.uninstall()  # noqa: SLF001


def _callback_state(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Return the state of a callback: its public attributes that are None, numbers, strings, arrays or array lists.

    `min_delta` is left out. Keras's callbacks flip its sign in their first epoch, so that resuming would flip the sign
    a second time.
    """
    return {
        name: value.copy() if isinstance(value, list | np.ndarray) else value
        for name, value in vars(callback).items()
        if not name.startswith("_")
        and name != "min_delta"
        and (
            value is None
            or isinstance(value, bool | int | float | str | np.generic | np.ndarray)
            or (isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value))
        )
    }


def _symbolic_tensor(spec: Any) -> keras.KerasTensor:
    """Return a symbolic tensor with the shape and dtype of `spec`, but with any batch size."""
    return keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name)


def _set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Let the ``fit`` that is starting begin with `epoch` instead of its argument `initial_epoch`.

    Keras has no public way to do so. Its own ``BackupAndRestore`` sets the same private attribute.
    """
    model._initial_epoch = epoch  # noqa: SLF001
