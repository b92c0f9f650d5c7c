"""Checkpoints that survive a crash: complete or absent, verified before use, and ordered by their own names."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import time
from typing import TYPE_CHECKING

from polyaxon_tracking.checkpoint_names import Checkpoint, as_checkpoint, check_suffix, checkpoint_name
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.integrity import size_on_disk, sync_and_checksum
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.retention import Retention, check_max_to_keep, to_remove
from polyaxon_tracking.storage.disk import file_in_place_of
from polyaxon_tracking.storage.opening import open_directory
from polyaxon_tracking.urls import is_url, path_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from polyaxon_tracking.storage.staged import StagedFile

__all__ = ["Checkpoint", "CheckpointManager"]

_logger = logging.getLogger("polyaxon_tracking")

# Most wrong values are the ``None`` of `get_outputs_path`.
_ADVICE = (
    "get_outputs_path() returns None off the cluster: write "
    'CheckpointManager(get_outputs_path("checkpoints") or "outputs/checkpoints").'
)


class CheckpointManager:
    """Save and find the checkpoints of one training, in its own directory.

    Each save is complete or absent. An old checkpoint is removed only after the new checkpoint is on disk, and `latest`
    returns only a checkpoint that it has verified. You choose the format of the files; this class never reads their
    content. On a local disk, a checkpoint may also be a directory of files, for example if each rank writes its shard.

    Verification finds damage, not forgery: load only checkpoints from directories you trust.

    Args:
        directory: a local directory, created by the first save, or a URL that fsspec knows, such as
            ``s3://bucket/run/checkpoints``. For a URL, files are written to ``$TMPDIR`` and then uploaded, and
            downloaded before they are read.
        max_to_keep: how many of the newest checkpoints are kept. Also kept are the newest checkpoint of an earlier
            training, from which this training did not resume, and the newest checkpoint without NaN.
        keep_every_n_epochs: keep the first checkpoint at or after each multiple of this number of epochs for good.
        keep_every: keep the first checkpoint for good, and then the first one whenever this time has passed since. The
            names of checkpoints kept for good say so, and no later training in the directory removes them.

    Raises:
        TrackingError: an option has the wrong type or is out of range, or `directory` is a file, a malformed URL, empty
            or not a path.

    Examples:
        >>> manager = CheckpointManager("checkpoints", max_to_keep=2)
        >>> for step in (100, 200, 300):
        ...     with manager.save(step, suffix=".txt") as path:
        ...         _ = Path(path).write_text(f"weights of step {step}")
        >>> checkpoint = manager.latest()
        >>> checkpoint.step, Path(checkpoint.path).read_text()
        (300, 'weights of step 300')
        >>> [checkpoint.step for checkpoint in manager.checkpoints()]
        [300, 200]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        max_to_keep: int = 2,
        *,
        keep_every_n_epochs: int | None = None,
        keep_every: timedelta | None = None,
    ) -> None:
        self._retention = Retention(max_to_keep, keep_every_n_epochs, keep_every)
        self._directory = open_directory(path_text(directory, "directory", _ADVICE))
        self.directory = self._directory.path
        if not is_url(self.directory) and (file := file_in_place_of(self.directory)):
            raise TrackingError(
                f"Received directory={shown_path(self.directory)}, and {shown_path(file)} is a file. Expected a "
                f"directory or the path of a new one. Move the file away, or give another path."
            )
        self.max_to_keep = max_to_keep
        self._fetched: list[str] = []
        self._damaged: set[str] = set()
        self._known: set[str] | None = None  # names found at the first save, and names saved since
        self._warned = False
        self._warned_of_nan = False

    def __repr__(self) -> str:
        return f"CheckpointManager({self.directory!r}, max_to_keep={self.max_to_keep})"

    @contextlib.contextmanager
    def save(self, step: int, epoch: int = 0, *, suffix: str = ".ckpt", has_nan: bool = False) -> Iterator[str]:
        """Yield a local path to write one checkpoint to, and commit the checkpoint when the block ends.

        Args:
            step: steps done so far. A step that is not beyond the newest checkpoint's means that training started
                over; checkpoints saved from then on count as newer than all existing checkpoints.
            epoch: epochs finished so far.
            suffix: the file's ending. Some frameworks choose the format by the ending.
            has_nan: whether the weights hold NaN. Such a checkpoint does not replace the newest one without NaN.

        Raises:
            TrackingError: `step`, `epoch` or `suffix` is not usable, or the block wrote no file.
            OSError: writing failed; the existing checkpoints are untouched.

        If the block creates a directory at the path, the checkpoint is that directory.
        """
        staged = self.stage(step, epoch, suffix=suffix, has_nan=has_nan)
        with staged.writing() as path:
            yield path
        staged.commit()

    def stage(self, step: int, epoch: int = 0, *, suffix: str = ".ckpt", has_nan: bool = False) -> StagedFile:
        """Return a file to write one checkpoint to, which any thread may commit, as `save` does at the block's end.

        The arguments and errors are those of `save`.
        """
        step, epoch = _checked_count("step", step), _checked_count("epoch", epoch)
        check_suffix(suffix)
        if has_nan:
            self._warn_of_nan(step)
        known = self._known_names()

        def publish(path: str) -> None:
            crc = sync_and_checksum(path, self._directory.sync)
            name = self._name(step, epoch, crc, suffix, has_nan=has_nan)
            self._directory.publish(path, name)
            known.add(name)
            self.release()
            self.prune(self.max_to_keep)

        return self._directory.stage(f"step={step:010d}{suffix}", publish)

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints in the directory, newest first, read only from their names."""
        listed = (as_checkpoint(self.directory, name) for name in self._directory.names())
        found = [checkpoint for checkpoint in listed if checkpoint is not None]
        return sorted(found, key=lambda checkpoint: (checkpoint.age, checkpoint.path), reverse=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, or ``None`` if there are no checkpoints at all.

        A damaged checkpoint is skipped with a warning, and not removed. Only the returned checkpoint and newer, damaged
        checkpoints are read. From a store, they are downloaded; the local copy is kept until the next `save` or
        `release`.

        Raises:
            TrackingError: there are checkpoints, but none is intact; the message lists them. Or the local disk has no
                room for a local copy, or the bucket does not exist.
        """
        return next(self.iter_intact(), None)

    def iter_intact(self) -> Iterator[Checkpoint]:
        """Yield the intact checkpoints, newest first, each verified just before it is yielded; otherwise as `latest`.

        This is for a caller that may reject an intact checkpoint and then try the next checkpoint.
        """
        damaged: dict[str, str] = {}
        found_one = pruned = False
        for listed in self.checkpoints():
            try:
                checkpoint = listed._replace(path=self._directory.fetch(listed.name))
            except FileNotFoundError:
                pruned = True  # by a training that still runs, since the listing
                continue
            self._fetched.append(checkpoint.path)
            with Progress(f"Verifying {checkpoint.source}", size_on_disk(checkpoint.path)) as progress:
                problem = checkpoint.verify(progress.advance)
            if problem is not None and not os.path.lexists(checkpoint.path):
                pruned = True
                continue
            if problem is not None:
                self._directory.release(self._fetched.pop())
                damaged[checkpoint.source] = problem
                self._damaged.add(checkpoint.name)
                continue
            if damaged and not found_one:
                _logger.warning(
                    "Skipped damaged checkpoints, using %s instead: %s", checkpoint.source, _describe(damaged)
                )
            found_one = True
            yield checkpoint
        if pruned and not found_one:
            yield from self.iter_intact()
        elif damaged and not found_one:
            raise TrackingError(
                f"Received only damaged checkpoints in {shown_path(self.directory)}: {_describe(damaged)}. Expected at "
                f"least one that is intact. Training does not start from scratch by itself then: put an intact copy "
                f"there, or, to start from scratch, move these away or pass resume=False to the callback."
            )

    def release(self) -> None:
        """Remove the local copies made by `latest` and `iter_intact`, once they are read. Local directories have none.

        `save` and the end of the process also remove them. A local copy stays while another process on this machine
        needs it.
        """
        while self._fetched:
            self._directory.release(self._fetched.pop())

    def prune(self, max_to_keep: int = 1) -> None:
        """Remove all but the `max_to_keep` newest checkpoints, for example because training has ended.

        As after a save, those that are kept for another reason stay, and those that another training has saved since.

        Raises:
            TrackingError: `max_to_keep` is not a positive number.
        """
        check_max_to_keep(max_to_keep)
        # The newest checkpoint is safe, so an old checkpoint that cannot be removed is no reason to end training.
        try:
            found, known = self.checkpoints(), self._known_names()
        except OSError as error:
            _logger.warning(
                "No old checkpoint in %s was removed, because listing them failed: %s", self.directory, error
            )
            return
        foreign = [checkpoint.path for checkpoint in found if checkpoint.name not in known]
        if foreign and not self._warned:
            self._warned = True
            _logger.warning(
                "Another training, or another callback of this one, saves its checkpoints here too, such as %s. Both "
                "keep theirs, and the next start resumes from the newest checkpoint of both. Give each its own outputs "
                "path, or end the other",
                foreign[0],
            )
        whole = [checkpoint for checkpoint in found if checkpoint.name in known - self._damaged]
        for checkpoint in to_remove(whole, max_to_keep):
            try:
                self._directory.remove(checkpoint.name)
            except OSError as error:
                _logger.warning("The old checkpoint %s could not be removed: %s", checkpoint.path, error)

    def _known_names(self) -> set[str]:
        if self._known is None:
            self._known = {checkpoint.name for checkpoint in self.checkpoints()}
        return self._known

    def _warn_of_nan(self, step: int) -> None:
        if not self._warned_of_nan:
            self._warned_of_nan = True
            _logger.warning(
                "The weights after step %d hold NaN, as after a loss that became NaN. Checkpoints are still saved, and "
                "the newest checkpoint without NaN is kept, in %s",
                step,
                self.directory,
            )

    def _name(self, step: int, epoch: int, crc: int, suffix: str, *, has_nan: bool) -> str:
        """Return the name of a checkpoint that is saved now."""
        existing, start, kept_at = self.checkpoints(), 1, None
        if existing:
            newest = existing[0]
            start = newest.start if (step, epoch) > (newest.step, newest.epoch) else newest.start + 1
        same_start = [checkpoint for checkpoint in existing if checkpoint.start == start]
        if not has_nan and self._retention.keeps_for_good(epoch, now := int(time.time()), same_start):
            kept_at = now
        return checkpoint_name(step, epoch, start, crc, suffix, has_nan=has_nan, kept_at=kept_at)


def _checked_count(name: str, value: int) -> int:
    try:
        number = operator.index(value)  # accepts NumPy's integers also, but no float
    except TypeError:
        number = -1
    if number < 0:
        raise TrackingError(f"Received {name}={value!r}. Expected a whole number, 0 or more.") from None
    return number


def _describe(damaged: dict[str, str]) -> str:
    return "; ".join(f"{path}: {problem}" for path, problem in damaged.items())
