"""A training loop of the user's own without torch, whose state two functions of the user save and load."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from polyaxon_tracking.checkpoint_names import check_suffix
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.training.options import SaveOptions
from polyaxon_tracking.training.run import Run, RunPaths
from polyaxon_tracking.training.session import Action, TrainingSession

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["StepLoop"]


class StepLoop(RunPaths):
    """Make a loop on JAX, NumPy or anything else resume from its newest intact checkpoint after the process was killed.

    The functions `save` and `load` write and read the whole state that training needs again: weights, the optimizer's
    state, and the random generators that the steps use. The number of steps done is saved for you. In a run of the
    platform, the loop resumes from the newest intact checkpoint. Elsewhere, `resume` decides, and each start has its
    own ``./outputs/version_N``. For a loop on torch, `polyaxon_torch.TrainingLoop` does more.

    Args:
        save: takes a local path, and writes the state there: a file, or on a local disk also a directory.
        load: takes a local path, and reads there what `save` has written.
        suffix: the ending of the checkpoints' names. Some formats need their own, such as ``.npz``.
        datasets: names of the datasets that training needs, or a mapping from each name to its path on this machine.
            The mapping's paths are used only if the environment names no data. `data_path` returns the path of each.
        resume: ``True`` resumes from the newest intact checkpoint, outside a run from that in the newest ``version_N``
            with checkpoints. ``False`` starts from scratch. By default, only a run resumes.
        name: the name of this training, such as ``"fold-3"``, if the script trains several times. The checkpoints of a
            named training are in ``<outputs>/checkpoints/<name>``.
        every_n_train_steps: number of steps after which to save. By default, as often as costs 1% of the time, but not
            within 10 seconds of the last save; with ``None`` only where `train_time_interval` asks for it.
        train_time_interval: time after which to save again.
        max_to_keep: number of the newest checkpoints to keep. By default, two while training runs, and one once it has
            ended.
        keep_every: keep the first checkpoint for good, and then the first one whenever this time has passed since.
        loggers: names of more loggers whose level is set by ``POLYAXON_LOG_LEVEL``.
        background: whether to sync, verify and upload what `save` has written while training continues.
        write_timeout: maximum time that the next save and the end of training wait for pending writes. An error is
            raised after that time.

    Raises:
        TrackingError: `save` or `load` cannot be called, a dataset is unknown or missing, the outputs path cannot be
            written to, a variable is malformed, or an argument is out of range.

    Examples:
        >>> import json
        >>> from pathlib import Path
        >>> state = {"weight": 1.0}
        >>> def save(path):
        ...     _ = Path(path).write_text(json.dumps(state))
        >>> def load(path):
        ...     state.update(json.loads(Path(path).read_text()))
        >>> with StepLoop(save, load, suffix=".json") as training:
        ...     for step in training.steps(100):
        ...         state["weight"] -= 0.1 * state["weight"]
        >>> training.step, round(state["weight"], 7)
        (100, 2.66e-05)
    """

    def __init__(
        self,
        save: Callable[[str], object],
        load: Callable[[str], object],
        *,
        suffix: str = ".ckpt",
        datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]] = (),
        resume: bool | None = None,
        name: str | None = None,
        every_n_train_steps: int | Literal["auto"] | None = "auto",
        train_time_interval: timedelta | None = None,
        max_to_keep: int | None = None,
        keep_every: timedelta | None = None,
        loggers: Iterable[str] = (),
        background: bool = True,
        write_timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        for argument, function in (("save", save), ("load", load)):
            if not callable(function):
                raise TrackingError(f"Received {argument}={function!r}. Expected a function that takes a path.")
        check_suffix(suffix)
        self._save_to, self._load_from, self._suffix = save, load, suffix
        self._options = SaveOptions(
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            max_to_keep=max_to_keep,
            keep_every=keep_every,
            background=background,
            write_timeout=write_timeout,
        )
        self._run = Run(datasets=datasets, loggers=loggers, resume=resume, name=name)
        self._session: TrainingSession | None = None
        self.step = 0
        """The number of steps done, over all starts."""
        self._was_left = False
        """Whether the script has left the loop over the steps with `break`, in this start or an earlier one."""
        self._is_in_step = self._is_resumed = self._is_done = False

    def __enter__(self) -> Self:
        """Load the newest intact checkpoint, if there is one and the loop resumes.

        Raises:
            TrackingError: no checkpoint is intact, or the newest has another `suffix`.
        """
        if self._session is not None:
            raise TrackingError("Received a StepLoop for a second `with` statement. Expected a new StepLoop.")
        checkpoints = self._run.checkpoint_manager(self, options=self._options)
        session = self._session = TrainingSession(self._run, checkpoints, self._options)
        newest = session.find_checkpoint((self._suffix,), "this StepLoop") if self._run.should_resume else None
        if newest is not None:
            self._load_from(newest.path)
            checkpoints.release()
            self._is_resumed = True
            self.step, self._was_left = newest.step, bool(newest.epoch)
        session.log.start(newest)
        session.begin(self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is written.

        After an exception within a step nothing is saved, because the state may be half changed.
        """
        assert self._session is not None
        session = self._session
        try:
            if error is not None:
                session.save_after_exception(error, self.step, self._save)
                return
            if self._end_open_step():
                self._was_left = True
                self._save()
            session.finish(has_ended=self._was_left or self._is_done)
        finally:
            session.close()

    def steps(self, number: int) -> Iterator[int]:
        """Yield the index of each step that is left of `number` steps, and save where that is due.

        The state must be whole at the end of each step. After a signal, the step is finished and its state saved. A
        `break` ends the training: started again, the script trains nothing.

        Args:
            number: the number of steps that the training has in all, over all its starts.

        Raises:
            TrackingError: `number` is not a whole number, or the call is not within the `with` statement.
            Exception: a write in the background has failed.
        """
        given: object = number  # of any type, because few scripts are type-checked
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise TrackingError(f"Received steps({number!r}). Expected a whole number, 0 or more.")
        session = self._running()
        self._end_open_step()
        if self._is_resumed and (self._was_left or self.step >= number):
            limit = f"left with `break` after {self.step} steps" if self._was_left else f"steps({number})"
            session.log.nothing_left(epoch=0, limit=limit)
        while self.step < number and not self._was_left:
            session.stepping_from, self._is_in_step = self.step, True
            yield self.step
            self._end_open_step()
            action = session.end_batch(self.step)
            if action is Action.STOP:
                session.stop(self.step, self._save)
            if action is Action.SAVE or self.step == number:
                self._save()
        self._is_done = True

    def _end_open_step(self) -> bool:
        """Count the step that the script is in, also one that it has left with `break`; return whether there is one."""
        was_in_step, self._is_in_step = self._is_in_step, False
        self.step += was_in_step
        return was_in_step

    def _running(self) -> TrainingSession:
        if self._session is None or not self._session.is_active:
            raise TrackingError(
                "Received a call of `steps` outside the `with` statement. Expected `with StepLoop(...) as training:` "
                "around the loop."
            )
        return self._session

    def _save(self) -> None:
        """Save the state; the number of epochs in the checkpoint's name is 1 if training has ended with `break`."""
        assert self._session is not None
        session = self._session
        session.wait()  # for the previous state, so that at most one is being written
        with session.saving(self.step):
            staged = session.checkpoints.stage(self.step, int(self._was_left), suffix=self._suffix)
            with staged.writing() as path:
                self._save_to(path)
            session.writer.submit(f"step {self.step} to {session.checkpoints.directory}", staged.commit)
            if not self._options.background:
                session.writer.wait()
