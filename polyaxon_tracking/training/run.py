"""The run's paths, datasets and log level for a framework's callback, resolved and checked before training starts."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from polyaxon_tracking.background import wait_for_all
from polyaxon_tracking.checkpoints import CheckpointManager
from polyaxon_tracking.environment import (
    DATA_PATHS,
    NO_OP,
    OUTPUTS_PATH,
    check_dataset_name,
    get_data_paths,
    get_outputs_path,
    is_true,
    unknown_dataset,
)
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import mask_urls, shown_path
from polyaxon_tracking.storage.disk import is_there
from polyaxon_tracking.storage.locks import sweep_below
from polyaxon_tracking.storage.probe import READ_RIGHT, WRITABLE, try_saving, what_failed, what_to_do
from polyaxon_tracking.training.hyperparameters import IfChanged, check_if_changed
from polyaxon_tracking.training.logging import set_log_level
from polyaxon_tracking.urls import is_url, join_below, local_path, path_text

__all__ = ["Run"]

_logger = logging.getLogger("polyaxon_tracking")

LOCAL_OUTPUTS = "outputs"

# The names of the directories with training states; the group is the number of the training, from the second on.
RESUME = re.compile(r"resume(?:-(\d+))?")


class _Training(NamedTuple):
    """The objects that a training trains, and whether the training has finished.

    The references are weak because a model must be freed after its training. See `Run.checkpoint_manager`.
    """

    objects: tuple[weakref.ref[object], ...]
    has_finished: bool = False


# The trainings of this process, by the checkpoint directory of each.
_begun: dict[str, _Training] = {}


class Run:
    """The run of this process: its outputs, its datasets and its log level. Every integration is built on this class.

    In a cluster, all three come from the environment. Elsewhere, outputs go to ``./outputs``, and `datasets` gives the
    paths of the datasets. The constructor sets the level of the loggers, and raises if anything is wrong.

    Args:
        datasets: names of the datasets that training needs; or a mapping from name to the path on this machine. The
            mapping's paths are used if the environment names no data at all.
        loggers: names of the user's loggers whose level follows ``POLYAXON_LOG_LEVEL``, in addition to
            ``polyaxon_tracking``.
        framework_loggers: names of the framework's loggers whose level follows it too.
        resume: whether to resume from the newest checkpoint. By default, only in a run of the platform.
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
        _check_name(name)
        check_if_changed(if_changed)
        self._name = name
        if not (resume is None or isinstance(resume, bool)):
            raise TrackingError(f"Received resume={resume!r}. Expected True, False or None.")
        self._loggers = ["polyaxon_tracking", *framework_loggers, *_checked_loggers(loggers)]
        set_log_level(self._loggers)
        outputs = get_outputs_path()
        self.on_cluster: bool = outputs is not None
        """Whether the platform sets the outputs path."""
        self.should_resume: bool = self.on_cluster if resume is None else resume
        """Whether training resumes from the newest checkpoint."""
        self.if_changed: IfChanged = if_changed
        """What to do if hyperparameters have changed since the checkpoint was saved."""
        self.outputs_path: str = checked_outputs(
            LOCAL_OUTPUTS if outputs is None else outputs, in_place=writes_in_place
        )
        """The directory of the outputs: an absolute local path, or a URL without secrets, in fsspec's form."""
        if not self.is_remote:
            sweep_below(join_below(self.outputs_path, "checkpoints"))
        self.is_model_trained: bool = False
        """Whether the model of the last `checkpoint_manager` has finished an earlier training in this process."""
        self._data_paths = _checked_datasets(datasets)
        if not self.on_cluster:
            why = f"{NO_OP} is true" if is_true(NO_OP) else f"{OUTPUTS_PATH} is not set"
            _logger.info("%s: outputs go to %s", why, self.outputs_path)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a pickled run and set the log level again, because some launchers send the run to new processes."""
        vars(self).update(state)
        set_log_level(self._loggers)
        if self.is_remote and self.on_cluster:
            self.clean_path(get_outputs_path() or "")  # this process then keeps the URL's secrets

    @property
    def is_remote(self) -> bool:
        """Return whether the outputs path is a URL."""
        return is_url(self.outputs_path)

    @property
    def checkpoints_path(self) -> str:
        """The directory of the checkpoints: ``checkpoints`` below the outputs path, or the directory `name` in it."""
        return join_below(self.outputs_path, "checkpoints", self._name or "")

    def data_path(self, name: str) -> str:
        """Return the path of the dataset `name`, one of the constructor's `datasets`.

        Raises:
            TrackingError: `name` is not in `datasets`.
        """
        check_dataset_name(name)
        if name not in self._data_paths:
            raise TrackingError(
                f"Received the dataset name {shown_path(name)}. Expected one of those given as `datasets=`: "
                f"{', '.join(map(shown_path, self._data_paths)) or 'none were'}.{closest(name, list(self._data_paths))}"
            )
        return self._data_paths[name]

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

    def checkpoint_manager(self, model: object, *others: object, max_to_keep: int = 2) -> CheckpointManager:
        """Return the checkpoint manager of the training that starts now, for resuming and for saving.

        A script may train more than once (trials, folds, stages), and each training has its own checkpoint directory:
        the first ``resume`` in `checkpoints_path`, the next ``resume-2`` and so on, in the order of the script.
        Within one process, a training belongs to its model: the same object continues a training that ended with an
        exception or a signal. Another model starts the next training, however the previous training ended. The same
        model also starts the next training once its training has finished.

        Args:
            model: the object that is trained: any object that can be weakly referenced.
            others: further objects that must also be the same to continue a training.
            max_to_keep: how many of the newest checkpoints are kept.
        """
        wait_for_all()  # so that a checkpoint still being written, by a training that raised, is found
        objects = (model, *others)
        new = _Training(tuple(map(weakref.ref, objects)))
        finished = [one for one in [*_begun.values()] if one.has_finished]
        self.is_model_trained = any(_refer_to(one.objects[:1], (model,)) for one in finished)
        number = 1
        while True:
            directory = join_below(self.checkpoints_path, "resume" if number == 1 else f"resume-{number}")
            begun = _begun.setdefault(directory, new)  # one atomic call, because trials may run in threads
            if begun is new or (not begun.has_finished and _refer_to(begun.objects, objects)):
                return CheckpointManager(directory, max_to_keep)
            number += 1

    def mark_finished(self, checkpoints: CheckpointManager) -> None:
        """Record that the training for which `checkpoint_manager` returned `checkpoints` has finished."""
        begun = _begun.get(checkpoints.directory, _Training(()))
        _begun[checkpoints.directory] = begun._replace(has_finished=True)


def _refer_to(references: tuple[weakref.ref[object], ...], objects: tuple[object, ...]) -> bool:
    # Compare by identity, because a model may define its own `__eq__`.
    return len(references) == len(objects) and all(ref() is one for ref, one in zip(references, objects, strict=True))


def _is_below(outputs: str, path: str) -> bool:
    if is_url(path) or is_url(outputs):
        return f"{path}/".startswith(f"{outputs}/")
    outputs = os.path.realpath(outputs)
    return os.path.commonpath([outputs, os.path.realpath(local_path(path))]) == outputs


def checked_outputs(path: str, source: str = OUTPUTS_PATH, *, in_place: bool = False) -> str:
    """Return the outputs path, absolute or as a URL without secrets, after files were written there as a save does.

    Args:
        path: the outputs path.
        source: where `path` came from, for messages.
        in_place: whether saves also change a file before its end.

    Raises:
        TrackingError: one of the steps failed.
    """
    if is_url(path):
        from polyaxon_tracking.storage.object_store import check_writable  # here and not above: only URLs need it

        return check_writable(path, source)
    path = os.path.abspath(local_path(path))
    step = WRITABLE
    try:
        for step in try_saving(path, in_place=in_place):  # noqa: B007  # for the message
            pass
    except OSError as error:
        # `from None`: the message already holds everything that the error says
        raise TrackingError(
            f"Received the outputs path {shown_path(path)}, {what_failed(error, step)}. Expected a directory that "
            f"this user may write to. {what_to_do(error, step)}, or set {source} to another path."
        ) from None
    return path


def _checked_loggers(loggers: object) -> list[str]:
    expected = "Expected a list of names"
    if isinstance(loggers, str):
        raise TrackingError(f"Received loggers={loggers!r}, a string. {expected}: [{loggers!r}].")
    given = list(loggers) if isinstance(loggers, Iterable) else [loggers]
    names = [name for name in given if isinstance(name, str)]
    if len(names) < len(given):
        raise TrackingError(f"Received loggers={loggers!r}. {expected} of loggers, such as ['mine'].")
    return names


def _check_name(name: object) -> None:
    if name is None:
        return
    if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & set("/\\\0") or RESUME.fullmatch(name):
        raise TrackingError(
            f"Received name={name!r}. Expected the name of a directory for this training, such as 'fold-3': not empty, "
            f"without '/', and not 'resume'."
        )


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
                f"names if the cluster knows all of them."
            )
    on_cluster = get_data_paths()
    local = {name: os.fspath(path) for name, path in datasets.items()} if isinstance(datasets, Mapping) else {}
    available = local if on_cluster is None else on_cluster
    problems = []
    for name in names:
        if name not in available:
            problems.append(unknown_dataset(name, on_cluster))
        elif problem := _problem_of_data(available[name]):
            source = "`datasets=`" if on_cluster is None else DATA_PATHS
            problems.append(
                f"The dataset {shown_path(name)} is expected at {shown_path(available[name])}, according to {source}"
                f"{problem}."
            )
    if problems:
        raise TrackingError("\n".join(problems))
    return {name: available[name] for name in names}


def _problem_of_data(path: str) -> str | None:
    """Return why there is no data at the local `path`, and what to do about it; ``None`` if there is any."""
    try:
        if is_url(path) or is_there(local_path(path)):
            return None
    except OSError as error:
        return f", and cannot be read: {error.strerror}. {what_to_do(error, otherwise=READ_RIGHT)}, or correct the path"
    return ", and there is nothing. Correct the path, or put the data there"
