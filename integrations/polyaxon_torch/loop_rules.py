"""When a `TrainingLoop` resumes, counts a step, saves and stops: one training, by the rules of `TrainingSession`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from polyaxon_torch.loop_data import LoopData
from polyaxon_torch.loop_state import METADATA_KEY, LoopStateFile
from polyaxon_torch.process_group import TorchProcessGroup
from polyaxon_torch.rng import random_state, set_random_state
from polyaxon_torch.step_counter import StepCounter
from polyaxon_tracking.training import Action, Hyperparameters, TrainingSession, accept_hyperparameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from polyaxon_torch.stateful_objects import StatefulObjects
    from polyaxon_tracking import Checkpoint
    from polyaxon_tracking.training import Run, SaveOptions

__all__ = ["Training"]


class Training:
    """One training of a `TrainingLoop`: from the beginning to the end of its ``with`` statement.

    Args:
        run: the run of this process.
        options: how often to save, and how.
        objects: the objects that are trained.
        weights_only: whether resuming loads only tensors and plain values.
    """

    def __init__(self, run: Run, options: SaveOptions, objects: StatefulObjects, *, weights_only: bool) -> None:
        checkpoints = run.checkpoint_manager(objects.model, options=options)
        process_group = TorchProcessGroup(options.write_timeout)
        self._objects = objects
        self._session = TrainingSession(run, checkpoints, options, process_group)
        self._file = LoopStateFile(self._session, weights_only=weights_only)
        self._data = LoopData(process_group)
        self._hyperparameters = Hyperparameters(restored=objects.hyperparameters(), script={})
        self._resumed_hyperparameters: Mapping[str, Any] | None = None
        self._counter = StepCounter(objects.optimizers(), self._begin_step)
        self.step = 0
        self.epoch = 0
        self.is_in_epoch = False
        self._limit = 0
        """The number of epochs that the script has asked for."""
        self._was_left = False
        """Whether the script has left the loop over the epochs with `break`, in this start or an earlier one."""
        self._best: dict[str, float] = {}
        self._resumed: Checkpoint | None = None
        self._random: dict[str, Any] | None = None
        """The random numbers to restore when the script comes to the place where the state was saved."""
        self._has_reserved_memory = False

    @property
    def is_running(self) -> bool:
        """Return whether training has begun and not ended."""
        return self._session.is_active

    # Begin and end

    def begin(self) -> None:
        """Resume from the newest intact training state, or start from scratch.

        Raises:
            TrackingError: as `TrainingLoop.__enter__`.
        """
        try:
            self._resumed = self._resume()
            self._session.log.start(self._resumed)
            self._session.begin(self.step)
        except BaseException:
            self._close()
            raise

    def end(self, error: BaseException | None) -> None:
        """Save what is not saved yet, wait for all writes, and end the training.

        Args:
            error: the exception that ends it, which the caller raises afterwards; ``None`` if the script is done.
        """
        try:
            if error is not None:
                self._session.save_after_exception(error, self.step, functools.partial(self._save, at_step=True))
                return
            if self.is_in_epoch:  # the script has left the loop with `break`
                self._complete_epoch()
                self._was_left = True
                self._save()
            self._session.finish(has_ended=self._was_left or self.epoch >= self._limit)
        finally:
            self._close()

    def _close(self) -> None:
        self._counter.remove()
        self._session.close()
        self._file.close()

    def _resume(self) -> Checkpoint | None:
        """Load the newest intact training state, and return its checkpoint; ``None`` to start from scratch."""
        session = self._session
        found = session.find_checkpoint((".pt",), "TrainingLoop") if session.run.should_resume else None
        if found is None:
            return None
        state = self._file.load(found)
        metadata = state.pop(METADATA_KEY)
        if not accept_hyperparameters(session, found.source, metadata["hyperparameters"], self._hyperparameters):
            return None
        with session.process_group.share_errors():
            self._objects.load_state_dict(state, metadata["classes"], found.source)
        self.step, self.epoch = metadata["step"], metadata["epoch"]
        self._limit, self._was_left, self._best = metadata["limit"], metadata["was_left"], metadata["best"]
        self._resumed_hyperparameters = metadata["hyperparameters"]
        self._data.load_state_dict(metadata["data"])
        rank = session.process_group.rank
        self._random = metadata["random"][rank] if self._data.has_as_many_ranks(metadata["random"]) else None
        session.checkpoints.release()
        return found

    # Epochs

    def ask_for_epochs(self, number: int) -> None:
        """Record that the script asks for `number` epochs in all."""
        if self.is_in_epoch:  # the script has left an earlier loop with `break`
            self.end_epoch()
        if number > self._limit:
            self._was_left = False
        self._limit = max(self._limit, number)
        if self._resumed is not None and not self.has_epochs_left(number):
            limit = None if self._was_left else f"epochs({number})"
            self._session.log.nothing_left(epoch=self.epoch, limit=limit)

    def has_epochs_left(self, number: int) -> bool:
        """Return whether fewer than `number` epochs are done, and the script has not left the loop."""
        return self.epoch < number and not self._was_left

    def begin_epoch(self) -> None:
        """Begin an epoch, or continue within the epoch in which the state was saved."""
        self.is_in_epoch = True
        if not self._data.resumes_within_epoch:
            self._restore_random_numbers()

    def end_epoch(self) -> None:
        """Count the epoch and always save, because a validation may have changed something since the last batch."""
        self._complete_epoch()
        if self._session.end_batch(self.step) is Action.STOP:
            self._session.stop(self.step, self._save)
        self._save()

    def _complete_epoch(self) -> None:
        self._end_open_batch()
        self.is_in_epoch = False
        self.epoch += 1
        self._data.end_epoch()
        self._session.saved_step = None

    def _restore_random_numbers(self) -> None:
        random, self._random = self._random, None
        if random is not None:
            set_random_state(random)

    # Batches

    def begin_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Return an iterator over the batches of `loader` that are left."""
        self._end_open_batch()
        return self._data.batches(loader, self.epoch, self._restore_random_numbers)

    def end_batch(self) -> None:
        """Count the step, and save or stop if that is due; both wait until an optimizer has made its step."""
        has_stepped = self._count_step()
        action = self._session.end_batch(self.step)
        if has_stepped and action is Action.STOP:
            self._session.stop(self.step, self._save)
        if has_stepped and action is Action.SAVE:
            self._save()

    def _begin_step(self) -> None:
        self._session.stepping_from = self.step

    def _end_open_batch(self) -> None:
        """Count the step of a batch that the script has left with `break`."""
        if self._data.is_in_batch:
            self._data.is_in_batch = False
            self._count_step()

    def _count_step(self) -> bool:
        """Return whether an optimizer has made a step since the last call, and count it."""
        if not self._counter.take():
            return False
        self.step += 1
        self._data.record_step()
        if not self._has_reserved_memory:  # the optimizers have their state from their first step on
            self._has_reserved_memory = True
            self._file.reserve_memory(self._objects.state_dict())
        return True

    # Save

    def save_best(self, path: str, filename: str, value: Any, *, sign: int) -> bool:
        """Save the weights of the models to `path` if `sign * value` is the highest so far; return whether it is."""
        value = float(value.item() if hasattr(value, "item") else value)
        value = self._session.process_group.gather(value)[0]
        if not sign * value > sign * self._best.get(filename, -sign * float("inf")):
            return False
        self._best[filename] = value
        self._file.save_weights(
            path, self.step, {name: one.state_dict() for name, one in self._objects.modules().items()}
        )
        return True

    def _save(self, *, at_step: bool = False) -> None:
        """Save the training state, with the current position in the data, or with that at the last step."""
        random = random_state() | self._data.random_state(at_step=at_step)
        with self._session.saving(self.step):
            metadata = {
                "step": self.step,
                "epoch": self.epoch,
                "limit": self._limit,
                "was_left": self._was_left,
                "best": dict(self._best),
                "classes": self._objects.classes(),
                "hyperparameters": self._hyperparameters.as_saved(self._resumed_hyperparameters),
                "data": self._data.state_dict(at_step=at_step),
                "random": self._session.process_group.gather(random),
            }
            self._file.save(self._objects.state_dict() | {METADATA_KEY: metadata}, self._objects.modules())
