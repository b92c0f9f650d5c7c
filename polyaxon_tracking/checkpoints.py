"""Checkpoints that survive a crash: complete or absent, verified before use, and ordered by their own names."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.integrity import find_damage, size_on_disk, sync_and_checksum
from polyaxon_tracking.progress import Progress
from polyaxon_tracking.redaction import shown_path
from polyaxon_tracking.storage.disk import file_in_place_of
from polyaxon_tracking.storage.opening import open_directory
from polyaxon_tracking.urls import is_url, path_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.storage.staged import StagedFile

__all__ = ["Checkpoint", "CheckpointManager"]

_logger = logging.getLogger("polyaxon_tracking")

# A checkpoint's name holds its step, epoch and start, and the CRC-32 of its bytes. So a checkpoint of any format is one
# file, and a listing is enough to find the newest.
# `.nan` comes before the file's ending if the weights hold NaN.
_NAME = re.compile(r"step=(\d+)-epoch=(\d+)-start=(\d+)-crc=([0-9a-f]{8})(\.nan)?((?:\.\w+)+)")
_SUFFIX = re.compile(r"(?:\.\w+)+")

# Most wrong values are the ``None`` of `get_outputs_path`.
_ADVICE = (
    "get_outputs_path() returns None off the cluster: write "
    'CheckpointManager(get_outputs_path("checkpoints") or "outputs/checkpoints").'
)


class Checkpoint(NamedTuple):
    """One checkpoint in a directory: its path, and what its name records."""

    path: str
    """The path of the file. In a store, this is the object's URL; from `latest`, the path of its local copy."""
    step: int
    """The number of steps done when the checkpoint was saved."""
    epoch: int
    """The number of epochs finished when the checkpoint was saved, so also the index of the epoch to resume with."""
    start: int
    """How often training had started from scratch in this directory, counted from 1."""
    crc: int
    """The CRC-32 of the file's bytes; for a directory, of a list with the name, size and CRC-32 of each file in it."""
    source: str
    """The path or URL where the checkpoint is kept; unlike `path`, never that of a local copy."""

    @property
    def name(self) -> str:
        """The checkpoint's name in its directory."""
        return self.source.rpartition("/")[2]

    @property
    def has_nan(self) -> bool:
        """Return whether the weights in the checkpoint hold NaN, as after a loss that became NaN."""
        match = _NAME.fullmatch(self.name)
        return match is not None and match[5] is not None

    @property
    def age(self) -> tuple[int, int, int]:
        """The sort key: greater for a newer checkpoint. Modification times mislead: clocks differ, copies set them."""
        return self.start, self.step, self.epoch

    def verify(self, advance: Callable[[int], object] | None = None) -> str | None:
        """Return what is wrong with the file, or ``None`` if its bytes are those saved. Reads the whole file.

        Args:
            advance: called repeatedly with the number of bytes read since the last call.
        """
        if not is_url(self.path):
            return find_damage(self.path, self.crc, advance)
        from polyaxon_tracking.storage.download_cache import (  # here and not above: only URLs need it
            cached_path,
            release,
        )

        try:
            path = cached_path(self.path)
        except FileNotFoundError as error:
            return error.strerror
        try:
            return find_damage(path, self.crc, advance)
        finally:
            release(path)


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

    Raises:
        TrackingError: `max_to_keep` is not a positive number, or `directory` is a file, a malformed URL, empty or not a
            path.

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

    def __init__(self, directory: str | os.PathLike[str], max_to_keep: int = 2) -> None:
        check_max_to_keep(max_to_keep)
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
        if not (isinstance(suffix, str) and _SUFFIX.fullmatch(suffix)):
            raise TrackingError(f"Received suffix={suffix!r}. Expected a file's ending, such as '.ckpt'.")
        if has_nan:
            self._warn_of_nan(step)
        if self._known is None:
            self._known = {checkpoint.name for checkpoint in self.checkpoints()}
        known = self._known

        def publish(path: str) -> None:
            crc = sync_and_checksum(path, self._directory.sync)
            name = f"step={step:010d}-epoch={epoch}-start={self._start(step, epoch)}-crc={crc:08x}"
            name += f"{'.nan' if has_nan else ''}{suffix}"
            self._directory.publish(path, name)
            known.add(name)
            self.release()
            self._prune(known)

        return self._directory.stage(f"step={step:010d}{suffix}", publish)

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints in the directory, newest first, read only from their names."""
        found = [
            Checkpoint(path, int(match[1]), int(match[2]), int(match[3]), int(match[4], 16), path)
            for name in self._directory.names()
            if (match := _NAME.fullmatch(name)) and (path := f"{self.directory}/{name}")
        ]
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

    def _warn_of_nan(self, step: int) -> None:
        if not self._warned_of_nan:
            self._warned_of_nan = True
            _logger.warning(
                "The weights after step %d hold NaN, as after a loss that became NaN. Checkpoints are still saved, and "
                "the newest checkpoint without NaN is kept, in %s",
                step,
                self.directory,
            )

    def _start(self, step: int, epoch: int) -> int:
        newest = next(iter(self.checkpoints()), None)
        if newest is None:
            return 1
        return newest.start if (step, epoch) > (newest.step, newest.epoch) else newest.start + 1

    def _prune(self, known: set[str]) -> None:
        # The new checkpoint is safe, so an old checkpoint that cannot be removed is no reason to end training.
        try:
            found = self.checkpoints()
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
        newest = [checkpoint for checkpoint in whole if checkpoint.start == whole[0].start][: self.max_to_keep]
        # If training started over, perhaps by mistake, the newest checkpoint of the earlier training is kept.
        earlier = [checkpoint for checkpoint in whole if checkpoint.start < whole[0].start]
        without_nan = [checkpoint for checkpoint in whole if not checkpoint.has_nan]
        kept = [*newest, *earlier[: max(1, self.max_to_keep - len(newest))], *without_nan[:1]]
        for checkpoint in whole:
            if checkpoint in kept:
                continue
            try:
                self._directory.remove(checkpoint.name)
            except OSError as error:
                _logger.warning("The old checkpoint %s could not be removed: %s", checkpoint.path, error)


def check_max_to_keep(max_to_keep: object) -> None:
    """Raise a `TrackingError` unless `max_to_keep` is a whole number above zero."""
    if isinstance(max_to_keep, bool) or not isinstance(max_to_keep, int) or max_to_keep < 1:
        raise TrackingError(f"Received max_to_keep={max_to_keep!r}. Expected a whole number, 1 or more.")


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
