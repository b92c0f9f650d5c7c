"""The run's paths, datasets and log level for a framework's callback, resolved and checked before training starts.

`Run.checkpoint_manager` also gives each training its checkpoint directory, which `checkpoint_directories.py` chooses:
``resume``, ``resume-2`` and so on.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.background import wait_for_all
from polyaxon_tracking.datasets import check_dataset_name, local_data_path
from polyaxon_tracking.environment import (
    NO_OP,
    OUTPUTS_PATH,
    get_outputs_path,
    is_true,
)
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import mask_urls, shown_path
from polyaxon_tracking.storage.locks import sweep_below
from polyaxon_tracking.training import checkpoint_directories
from polyaxon_tracking.training.dataset_checks import checked_datasets
from polyaxon_tracking.training.hyperparameters import IfChanged, check_if_changed
from polyaxon_tracking.training.inputs import (
    check_name,
    checked_local_outputs,
    checked_loggers,
    checked_outputs,
)
from polyaxon_tracking.training.local_outputs import is_restarted, newest_with_checkpoints
from polyaxon_tracking.training.log_level import set_log_level
from polyaxon_tracking.training.options import SaveOptions
from polyaxon_tracking.urls import is_url, join_below, local_path, path_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polyaxon_tracking.checkpoints import CheckpointManager

__all__ = ["Run", "RunPaths"]

_logger = logging.getLogger("polyaxon_tracking")


class Run:
    """The run of this process: its outputs, its datasets and its log level. Every integration is built on this class.

    In a cluster, all three come from the environment. Elsewhere, `datasets` gives the paths of the datasets, and all
    trainings and ranks of this start share one directory in ``./outputs`` (``version_0``, ``version_1`` and so on): a
    new one, or with ``resume=True`` the newest with checkpoints. The constructor sets the level of the loggers, and
    raises if anything is wrong.

    Args:
        datasets: names of the datasets that training needs; or a mapping from name to the path on this machine. The
            mapping's paths are used if the environment names no data at all.
        loggers: names of the user's loggers whose level follows ``POLYAXON_LOG_LEVEL``, in addition to
            ``polyaxon_tracking``.
        framework_loggers: names of the framework's loggers whose level follows it too.
        resume: whether to resume from the newest checkpoint. By default, only in a run of the platform, and where
            `torchrun` starts the ranks again.
        if_changed: what to do if the hyperparameters in the script differ from those of the newest checkpoint: resume
            and ``"warn"``, ``"raise"``, or ``"restart"`` from scratch.
        name: the name of the training, such as ``fold-3``: its checkpoints are then in a directory with this name.
        writes_in_place: whether the framework changes a file before its end while writing it, as HDF5 does. Then the
            outputs path is also checked for that.

    Raises:
        TrackingError: a dataset is unknown or missing, the outputs path cannot be written to, a variable is malformed,
            `loggers` are no names, `name` is not the name of a directory, or `if_changed` is none of its three values.

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
        framework_loggers: Iterable[str] = (),
        resume: bool | None = None,
        if_changed: IfChanged = "warn",
        name: str | None = None,
        writes_in_place: bool = False,
    ) -> None:
        check_name(name)
        check_if_changed(if_changed)
        self._name = name
        if not (resume is None or isinstance(resume, bool)):
            raise TrackingError(f"Received resume={resume!r}. Expected True, False or None.")
        self._loggers = ["polyaxon_tracking", *framework_loggers, *checked_loggers(loggers)]
        set_log_level(self._loggers)
        outputs = get_outputs_path()
        self.on_cluster: bool = outputs is not None
        """Whether the platform sets the outputs path."""
        self.should_resume: bool = (self.on_cluster or is_restarted()) if resume is None else resume
        """Whether training resumes from the newest checkpoint."""
        self.if_changed: IfChanged = if_changed
        """What to do if hyperparameters have changed since the checkpoint was saved."""
        self.outputs_path: str = (
            checked_local_outputs(resume=self.should_resume, in_place=writes_in_place)
            if outputs is None
            else checked_outputs(outputs, in_place=writes_in_place)
        )
        """The directory of the outputs: an absolute local path, or a URL without secrets, in fsspec's form."""
        if not self.is_remote:
            sweep_below(join_below(self.outputs_path, "checkpoints"))
        self.is_model_trained: bool = False
        """Whether the model of the last `checkpoint_manager` has finished an earlier training in this process."""
        self._data_paths = checked_datasets(datasets)
        if not self.on_cluster:
            self._log_version()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a pickled run and set the log level again, because some launchers send the run to new processes."""
        vars(self).update(state)
        set_log_level(self._loggers)
        if self.is_remote and self.on_cluster:
            self.clean_path(get_outputs_path() or "")  # this process then keeps the URL's secrets

    def check_fresh(self, argument: str) -> None:
        """Check that training may start from scratch though the user passes `argument`, which asks for resuming.

        Raises:
            TrackingError: off the cluster, the checkpoints are in the directory of an earlier start.
        """
        if newest := self._version_to_resume():
            raise TrackingError(
                f"Received {argument}, and there is no checkpoint in {self.outputs_path}, the new directory of this "
                f"start. Expected resume=True too, which uses the newest directory with checkpoints, {newest}. Pass "
                f"PolyaxonCallback(resume=True), or leave {argument} out to start from scratch."
            )

    def _version_to_resume(self) -> str | None:
        """Return the name of the directory that ``resume=True`` would use off the cluster, if not this start's."""
        if self.on_cluster or self.should_resume:
            return None
        outputs, version = os.path.split(self.outputs_path)
        newest = newest_with_checkpoints(outputs)
        return None if newest == version else newest

    def _log_version(self) -> None:
        why = f"{NO_OP} is true" if is_true(NO_OP) else f"{OUTPUTS_PATH} is not set"
        more = ""
        if newest := self._version_to_resume():
            more = f"; resume=True would use {newest}"
        elif self.should_resume and newest_with_checkpoints(os.path.dirname(self.outputs_path)):
            more = ", the newest with checkpoints"
        _logger.info("%s: outputs go to %s%s", why, self.outputs_path, more)

    @property
    def is_remote(self) -> bool:
        """Return whether the outputs path is a URL."""
        return is_url(self.outputs_path)

    @property
    def checkpoints_path(self) -> str:
        """The directory of the checkpoints: ``checkpoints`` below the outputs path, or the directory `name` in it."""
        return join_below(self.outputs_path, "checkpoints", self._name or "")

    def data_path(self, name: str, *, download: bool = True) -> str:
        """Return the path of the dataset `name`, one of the constructor's `datasets`.

        Args:
            name: the name of the dataset.
            download: whether to download a dataset that is a URL, and to return the path of the local copy, as
                `get_data_path` does.

        Raises:
            TrackingError: `name` is not in `datasets`, or there is no room for a copy.
            OSError: the store does not respond, or a file arrived damaged.
        """
        check_dataset_name(name)
        if name not in self._data_paths:
            raise TrackingError(
                f"Received the dataset name {shown_path(name)}. Expected one of those given as `datasets=`: "
                f"{', '.join(map(shown_path, self._data_paths)) or 'none were'}.{closest(name, list(self._data_paths))}"
            )
        path = self._data_paths[name]
        return local_data_path(name, path) if download else path

    def checkpoint_path(self, name: str | os.PathLike[str]) -> str:
        """Return the path for a checkpoint: `name` below `checkpoints_path`, unless `name` is absolute or a URL.

        An absolute path or a URL outside the outputs path logs a warning.

        Raises:
            TrackingError: the name is not a path, or leaves the directory, as with ``..``.
        """
        name = path_text(name, "filepath")
        if not (os.path.isabs(name) or is_url(name)):
            return join_below(self.checkpoints_path, name)
        path = self.clean_path(name)
        self.warn_if_outside(path)
        return path

    def clean_path(self, path: str) -> str:
        """Return `path`; a URL in fsspec's form and without its secrets, which this process remembers."""
        if not is_url(path):
            return path
        from polyaxon_tracking.storage.credentials import locate  # here and not above: only URLs need it

        return locate(path).url

    def configure_driver(self) -> None:
        """Make fsspec's file systems in this process use the credentials of the outputs path, if that path is a URL.

        This is for a framework that opens the outputs path itself. The credentials go to fsspec's configuration in
        memory, and only if the URL or the platform gives any.
        """
        if self.is_remote:
            from polyaxon_tracking.storage.object_store import (
                configure_driver,  # here and not above: only URLs need it
            )

            configure_driver(self.outputs_path)

    def warn_if_outside(
        self, path: str, what: str = "Checkpoints", advice: str = "Leave the path out, or choose one below it"
    ) -> None:
        """Warn if `path`, a local path or a URL, is not below the outputs path: `what` goes there, and `advice`.

        Raises:
            TrackingError: `path` is a URL with one slash, which a framework may have made absolute.
        """
        if not is_url(path):
            local_path(os.path.relpath(path))
        if not _is_below(self.outputs_path, self.clean_path(path)):
            _logger.warning(
                "%s go to %s, outside the outputs path %s, and may be lost with the pod. %s",
                what,
                mask_urls(path),
                self.outputs_path,
                advice,
            )

    def why_fresh(self, checkpoints: CheckpointManager) -> str:
        """Return the reason, for the log, why a training starts from scratch."""
        newest = next(iter(checkpoints.checkpoints()), None)
        if newest is None:
            return f"{'no checkpoint in' if self.should_resume else 'checkpoints go to'} {checkpoints.directory}"
        if self.should_resume:
            return f"{checkpoints.directory} holds step {newest.step}, and keeps it"
        return f"{checkpoints.directory} holds step {newest.step}, and keeps it; resume=True would resume from it"

    def checkpoint_manager(
        self, model: object, *others: object, options: SaveOptions | None = None
    ) -> CheckpointManager:
        """Return the checkpoint manager of the training that starts now, for resuming and for saving.

        A script may train more than once (trials, folds, stages), and each training has its own checkpoint directory:
        the first ``resume`` in `checkpoints_path`, the next ``resume-2`` and so on, in the order of the script.
        Within one process, a training belongs to its model: the same object continues a training that ended with an
        exception or a signal. Another model starts the next training, however the previous training ended. The same
        model also starts the next training once its training has finished.

        Args:
            model: the object that is trained: any object that can be weakly referenced.
            others: further objects that must also be the same to continue a training.
            options: which checkpoints are kept.
        """
        wait_for_all()  # so that a checkpoint still being written, by a training that raised, is found
        self.is_model_trained = checkpoint_directories.has_finished_training(model)
        directory = checkpoint_directories.directory_of_training(self.checkpoints_path, (model, *others))
        return (options or SaveOptions()).checkpoint_manager(directory)

    def mark_finished(self, checkpoints: CheckpointManager) -> None:
        """Record that the training for which `checkpoint_manager` returned `checkpoints` has finished."""
        checkpoint_directories.mark_finished(checkpoints.directory)


class RunPaths:
    """The run's paths, as callbacks and loops show them to the user. A subclass sets `_run`."""

    _run: Run

    @property
    def outputs_path(self) -> str:
        """The directory or URL of this run's outputs."""
        return self._run.outputs_path

    def data_path(self, name: str, *, download: bool = True) -> str:
        """Return the path of the dataset `name`, which must be one of `datasets`.

        Args:
            name: the name of the dataset.
            download: whether to download a dataset that is a URL, and to return the path of the local copy: a file, or
                a directory if there are objects below the URL. All processes of a machine share one copy, and the
                next start downloads only what has changed. ``False`` returns the URL, for libraries that stream.

        Raises:
            TrackingError: `name` is not in `datasets`, there is nothing at the URL, or no room for a copy.
            OSError: the store does not respond, or a file arrived damaged.
        """
        return self._run.data_path(name, download=download)


def _is_below(outputs: str, path: str) -> bool:
    if is_url(path) or is_url(outputs):
        return f"{path}/".startswith(f"{outputs}/")
    outputs = os.path.realpath(outputs)
    return os.path.commonpath([outputs, os.path.realpath(local_path(path))]) == outputs
