"""The files that the ModelCheckpoints of one training have saved, also those that a kill left unknown to it."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

from polyaxon_lightning.framework import pl
from polyaxon_lightning.saved_files import absolute, start_of
from polyaxon_tracking.training import open_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    ModelCheckpoint = pl.callbacks.ModelCheckpoint

__all__ = ["OwnFiles"]

_MARK_KEY = "polyaxon_tracking_saved"
_MARK = re.compile(rb"by training ([0-9a-f]{32}) at step (\d+)")


class OwnFiles:
    """Marks the files of ModelCheckpoints, and finds those that were saved after the state that training resumes from.

    A kill loses the steps since the newest training state, but not the files that ModelCheckpoints saved in these
    steps. The restored ModelCheckpoints know nothing of these leftovers: none would ever be removed, and the file of a
    step that is saved again would get a version. Each file has a mark as its first entry, so that it is known without
    loading it: the id of the training, which every training state keeps too, and the step.
    """

    def __init__(self) -> None:
        self.training = secrets.token_hex(16)
        """The id of this training."""
        self._resumed_step: int | None = None
        self._known: set[str] = set()
        """The files that the resumed state names, and those that were saved since."""
        self._leftovers: dict[str, int] = {}
        """The files to remove once training is past the step of each."""

    def marked(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
        """Return `checkpoint`, which is about to be saved to `path`, with the mark."""
        self._known.add(path)
        self._leftovers.pop(path, None)
        return {_MARK_KEY: f"by training {self.training} at step {checkpoint['global_step']}"} | checkpoint

    def resume(self, training: str | None, step: int, named: set[str], callbacks: Iterable[Any]) -> None:
        """Find the leftovers of `callbacks`, because `training` resumes from a state after `step` that names `named`.

        A ModelCheckpoint that keeps all its files is left out: it has no surplus.
        """
        if training is None:  # of a state of an earlier version
            return
        self.training, self._resumed_step, self._known = training, step, {*named}
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and callback.save_top_k != -1:
                directory, pattern = open_directory(str(callback.dirpath)), _names_of(callback)
                names = filter(pattern.fullmatch, directory.names())
                for path in (absolute(f"{directory.path}/{name}") for name in names):
                    saved_at = self._step_of(path)
                    if saved_at is not None and saved_at > step:
                        self._leftovers[path] = saved_at

    def is_leftover(self, path: str) -> bool:
        """Return whether the file `path`, if it exists, may be saved again under its name."""
        if self._resumed_step is None:
            return False
        step = self._step_of(path)
        return step is not None and step >= self._resumed_step  # of that step, it may have come after the state

    def take_passed(self, step: int) -> set[str]:
        """Return the leftovers of the steps before `step`, and forget them."""
        passed = {path for path, saved_at in [*self._leftovers.items()] if saved_at < step}
        return {path for path in passed if self._leftovers.pop(path, None) is not None}

    def _step_of(self, path: str) -> int | None:
        """Return the step in the file `path`, if this training saved it and the resumed state does not know it."""
        mark = None if path in self._known else _MARK.search(start_of(path))
        return int(mark[2]) if mark is not None and mark[1].decode() == self.training else None


def _names_of(callback: ModelCheckpoint) -> re.Pattern[str]:
    """Return a pattern of the names that `callback` gives to its files; a copy that the user made has another name."""
    name = callback.filename or "{epoch}" + callback.CHECKPOINT_JOIN_CHAR + "{step}"
    pattern = ""
    for text in re.split(r"(\{[^}]*\})", name):
        field = re.match(r"\{([^:}]*)", text)
        if field is None:
            pattern += re.escape(text)
        else:
            inserted = field[1] + callback.CHECKPOINT_EQUALS_CHAR if callback.auto_insert_metric_name else ""
            pattern += re.escape(inserted) + ".*"
    version = rf"({re.escape(callback.CHECKPOINT_JOIN_CHAR)}v\d+)?"
    return re.compile(pattern + version + re.escape(callback.FILE_EXTENSION))
