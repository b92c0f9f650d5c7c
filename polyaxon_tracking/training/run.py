"""What a framework's callback needs to know of the run, resolved and checked before training starts."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from datetime import timedelta
from numbers import Integral

from polyaxon_tracking.background import wait_for_all
from polyaxon_tracking.checkpoints import CheckpointManager
from polyaxon_tracking.environment import (
    DATA_PATHS,
    NO_OP,
    OUTPUTS_PATH,
    get_data_paths,
    get_outputs_path,
    is_true,
    unknown_dataset,
)
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import mask_urls, shown_path
from polyaxon_tracking.storage.locks import staging, sweep_below
from polyaxon_tracking.training.logging import set_log_level
from polyaxon_tracking.urls import is_url, join_below, local_path

__all__ = ["Run"]

_logger = logging.getLogger("polyaxon_tracking")

LOCAL_OUTPUTS = "outputs"

# The trainings of this process: each one's directory of checkpoints, and what is trained, or `()` once the training has
# finished. Weak references, because a model must be freed with its training. See `Run.checkpoint_manager`.
_begun: dict[str, tuple[weakref.ref[object], ...]] = {}


class Run:
    """The run that this process is: its outputs, its datasets, its log level; the ground every integration stands on.

    In a cluster all of it comes from the environment. Elsewhere outputs go to ``./outputs``, and datasets are where
    `datasets` says. Constructing it sets the level of the loggers and raises for all that is wrong.

    Args:
        datasets: names of the datasets that training needs; or a mapping from name to the path on this machine, which
            is used where the environment names no data at all.
        loggers: names of loggers whose level follows ``POLYAXON_LOG_LEVEL``, beside ``polyaxon_tracking``.
        resume: whether to go on from the newest checkpoint. By default, only in a run of the platform.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, or a variable is
            malformed.

    Examples:
        >>> run = Run(datasets={"digits": "."})
        >>> run.on_cluster, run.data_path("digits")
        (False, '.')
        >>> class Model: ...
        >>> run.checkpoint_manager(Model()).latest() is None
        True
    """

    def __init__(
        self,
        *,
        datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]] = (),
        loggers: Iterable[str] = (),
        resume: bool | None = None,
    ) -> None:
        if isinstance(loggers, str):
            raise TrackingError(f"Received loggers={loggers!r}, a string. Expected a list of names: [{loggers!r}].")
        if not (resume is None or isinstance(resume, bool)):
            raise TrackingError(f"Received resume={resume!r}. Expected True, False or None.")
        self._loggers = ["polyaxon_tracking", *loggers]
        set_log_level(self._loggers)
        outputs = get_outputs_path()
        self.on_cluster: bool = outputs is not None
        """Whether the platform says where outputs go."""
        self.should_resume: bool = self.on_cluster if resume is None else resume
        """Whether training goes on from the newest checkpoint."""
        self.outputs_path: str = checked_outputs(LOCAL_OUTPUTS if outputs is None else outputs)
        """Where outputs go: an absolute local path, or a URL without secrets, as fsspec takes it."""
        if not self.is_remote:
            sweep_below(self.checkpoints_path)
        self._data_paths = _checked_datasets(datasets)
        if not self.on_cluster:
            why = f"{NO_OP} is true" if is_true(NO_OP) else f"{OUTPUTS_PATH} is not set"
            _logger.info("%s: outputs go to %s", why, self.outputs_path)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Do in a process that this was sent to what the constructor did in the first: some launchers start so."""
        vars(self).update(state)
        set_log_level(self._loggers)
        if self.is_remote and self.on_cluster:
            self.clean_path(get_outputs_path() or "")  # and keep the secrets in it

    @property
    def is_remote(self) -> bool:
        """Whether the outputs path is a URL."""
        return is_url(self.outputs_path)

    @property
    def checkpoints_path(self) -> str:
        """Where checkpoints go: ``checkpoints`` below the outputs path."""
        return join_below(self.outputs_path, "checkpoints")

    @staticmethod
    def check_frequency(every_n_train_steps: int | None, train_time_interval: timedelta | None) -> None:
        """Check how often a callback is told to save: when it is made, before training starts.

        Raises:
            TrackingError: `every_n_train_steps` is not a whole number above zero, or `train_time_interval` not a
                timedelta above zero.
        """
        steps: object = every_n_train_steps  # whatever it is: few scripts are checked for types
        interval: object = train_time_interval
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1):
            raise TrackingError(f"Received every_n_train_steps={steps!r}. Expected a whole number, 1 or more, or None.")
        if interval is not None and not (isinstance(interval, timedelta) and interval > timedelta(0)):
            raise TrackingError(
                f"Received train_time_interval={interval!r}. Expected a timedelta above zero, such as "
                f"timedelta(minutes=10), or None."
            )

    @staticmethod
    def should_save(every_n_train_steps: int | None, *, step: int, saved_step: int) -> bool:
        """Return whether a multiple of `every_n_train_steps` was reached or passed since the last save.

        A batch may count several steps, as with several optimizers, and so pass over a multiple.

        Args:
            every_n_train_steps: what the callback was given; None never asks for a save.
            step: the steps so far, at the end of a batch.
            saved_step: the steps at the last save, or where training began or was resumed.

        Examples:
            >>> [step for step in (7, 9, 11, 13) if Run.should_save(10, step=step, saved_step=7)]
            [11, 13]
            >>> Run.should_save(10, step=13, saved_step=11)
            False
        """
        return every_n_train_steps is not None and step // every_n_train_steps > saved_step // every_n_train_steps

    def data_path(self, name: str) -> str:
        """Where the dataset `name` is, one of those that were given as `datasets`.

        Raises:
            TrackingError: it was not given.
        """
        if name not in self._data_paths:
            raise TrackingError(
                f"Received the dataset name {shown_path(name)}. Expected one of those given as `datasets=`: "
                f"{', '.join(map(shown_path, self._data_paths)) or 'none were'}.{closest(name, list(self._data_paths))}"
            )
        return self._data_paths[name]

    def checkpoint_path(self, name: str) -> str:
        """Where a checkpoint called `name` goes: below `checkpoints_path`, unless it is an absolute path or a URL.

        A warning says where such a path lies outside the outputs path.

        Raises:
            TrackingError: the name climbs out of the directory.
        """
        if not (os.path.isabs(name) or is_url(name)):
            return join_below(self.checkpoints_path, name)
        path = self.clean_path(name)
        self.warn_if_outside(path)
        return path

    def clean_path(self, path: str) -> str:
        """`path` itself; where it is a URL, without secrets, and as fsspec takes it. This process keeps the secrets."""
        if not is_url(path):
            return path
        from polyaxon_tracking.storage.credentials import locate  # here and not above: it is for URLs alone

        return locate(path).url

    def configure_driver(self) -> None:
        """Have file systems of fsspec in this process use the credentials for the outputs path, where it is a URL.

        For a framework that opens it by itself. They go to fsspec's configuration in memory, and only where the URL or
        the platform gives any.
        """
        if self.is_remote:
            from polyaxon_tracking.storage.object_store import (
                configure_driver,  # here and not above: it is for URLs alone
            )

            configure_driver(self.outputs_path)

    def warn_if_outside(
        self, path: str, what: str = "Checkpoints", advice: str = "Leave the path out, or choose one below it"
    ) -> None:
        """Warn where `path`, a local one or a URL, is not below the outputs path: `what` goes there, and `advice`."""
        if not _is_below(self.outputs_path, self.clean_path(path)):
            _logger.warning(
                "%s go to %s, outside the outputs path %s, and may be lost with the pod. %s",
                what,
                mask_urls(path),
                self.outputs_path,
                advice,
            )

    def why_fresh(self, checkpoints: CheckpointManager) -> str:
        """The reason, for the log, why a training begins from scratch."""
        if self.should_resume:
            return f"no checkpoint in {checkpoints.directory}"
        newest = next(iter(checkpoints.checkpoints()), None)
        if newest is None:
            return f"checkpoints go to {checkpoints.directory}"
        return f"{checkpoints.directory} holds step {newest.step}, and keeps it; resume=True would go on from it"

    def checkpoint_manager(self, model: object, *others: object, max_to_keep: int = 2) -> CheckpointManager:
        """Return the checkpoints that the training which now begins resumes from and adds to.

        A script may train more than once (trials, folds, stages), and each training has checkpoints of its own: the
        first in ``checkpoints/resume``, the next in ``checkpoints/resume-2`` and so on, in the order of the script.
        Within one process a training belongs to its model: the same object continues a training that ended with an
        exception or a signal. Another model begins the next training, however the previous one ended, and so does the
        same model once its training has finished.

        Args:
            model: what is trained: any object that can be weakly referenced.
            others: further objects that must be the same, too, to continue a training.
            max_to_keep: how many of the newest checkpoints stay.
        """
        wait_for_all()  # what a training that ended with an exception has not yet written is to be found
        objects = (model, *others)
        new = tuple(map(weakref.ref, objects))
        number = 1
        while True:
            directory = join_below(self.checkpoints_path, "resume" if number == 1 else f"resume-{number}")
            begun = _begun.setdefault(directory, new)  # at once, because trials may run in threads
            if begun is new or _refer_to(begun, objects):
                return CheckpointManager(directory, max_to_keep)
            number += 1

    def mark_finished(self, checkpoints: CheckpointManager) -> None:
        """Note that the training for which `training` returned `checkpoints` has finished."""
        _begun[checkpoints.directory] = ()


def _refer_to(references: tuple[weakref.ref[object], ...], objects: tuple[object, ...]) -> bool:
    # By identity, because models may compare as they like.
    return len(references) == len(objects) and all(ref() is one for ref, one in zip(references, objects, strict=True))


def _is_below(outputs: str, path: str) -> bool:
    if is_url(path) or is_url(outputs):
        return f"{path}/".startswith(f"{outputs}/")
    outputs = os.path.realpath(outputs)
    return os.path.commonpath([outputs, os.path.realpath(local_path(path))]) == outputs


def checked_outputs(path: str, source: str = OUTPUTS_PATH) -> str:
    """The outputs path, absolute or without secrets, after a file was written there and removed.

    Raises:
        TrackingError: that did not work; the message names `source`, where the path came from.
    """
    if is_url(path):
        from polyaxon_tracking.storage.object_store import check_writable  # here and not above: it is for URLs alone

        return check_writable(path, source)
    path = os.path.abspath(local_path(path))
    try:
        with staging(path):
            pass
    except OSError as error:
        problem, advice = error.strerror, "Mount the volume for writing"
        if isinstance(error, NotADirectoryError):
            problem, advice = f"{shown_path(error.filename)} is a file", "Move it away"
        # `from None`: the message says all that the error does
        raise TrackingError(
            f"Received the outputs path {shown_path(path)}, which cannot be written to: {problem}. Expected a "
            f"directory that this user may write to. {advice}, or set {source} to another path."
        ) from None
    return path


def _checked_datasets(datasets: Iterable[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    if isinstance(datasets, str):
        name = shown_path(datasets)
        raise TrackingError(
            f"Received datasets={name}, a string. Expected a list of names, such as [{name}], or a mapping from name "
            f"to the path on this machine, such as {{{name}: 'data/digits'}}."
        )
    if not isinstance(datasets, Iterable):
        raise TrackingError(
            f"Received datasets={datasets!r}. Expected a list of names, or a mapping from name to the path on this "
            f"machine."
        )
    names = list(datasets)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TrackingError(f"Received datasets with the names {wrong}. Expected the names to be strings.")
    if isinstance(datasets, Mapping):
        wrong = [name for name, path in datasets.items() if not isinstance(path, str | os.PathLike)]
        if wrong:
            raise TrackingError(
                f"Received datasets without a path: {wrong}. Expected a path on this machine for each, or a list of "
                f"names alone where the cluster knows them all."
            )
    on_cluster = get_data_paths()
    local = {name: os.fspath(path) for name, path in datasets.items()} if isinstance(datasets, Mapping) else {}
    available = local if on_cluster is None else on_cluster
    problems = []
    for name in names:
        if name not in available:
            problems.append(unknown_dataset(name, on_cluster))
        elif not is_url(available[name]) and not os.path.exists(local_path(available[name])):
            source = "`datasets=`" if on_cluster is None else DATA_PATHS
            problems.append(
                f"The dataset {shown_path(name)} is expected at {shown_path(available[name])}, according to {source}, "
                f"and there is nothing. Correct the path, or put the data there."
            )
    if problems:
        raise TrackingError("\n".join(problems))
    return {name: available[name] for name in names}
