"""Checkpoints that survive: complete or absent, checked before use, the newest by their own record."""

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
from polyaxon_tracking.storage.opening import open_directory
from polyaxon_tracking.urls import is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Checkpoint", "CheckpointManager"]

_logger = logging.getLogger("polyaxon_tracking")

# A checkpoint records in its name where it stands and the CRC-32 of its bytes: one file, one state, whatever its
# format, and a listing alone tells which is the newest.
_NAME = re.compile(r"step=(\d+)-epoch=(\d+)-start=(\d+)-crc=([0-9a-f]{8})((?:\.\w+)+)")
_SUFFIX = re.compile(r"(?:\.\w+)+")


class Checkpoint(NamedTuple):
    """One checkpoint in a directory: where it is, and what it records of itself."""

    path: str
    """The file; where the directory is a URL, the object's URL, or a local copy of it as `latest` returns."""
    step: int
    """Steps done when it was saved."""
    epoch: int
    """Epochs finished when it was saved, so also the index of the epoch to go on with."""
    start: int
    """How often training had begun from scratch in this directory, from 1."""
    crc: int
    """CRC-32 of the file's bytes; of a directory, of a list with the name, size and CRC-32 of each file in it."""
    source: str
    """Where it is kept: `path`, or the URL of the object of which that is a local copy."""

    @property
    def name(self) -> str:
        """The file's name in its directory."""
        return self.source.rpartition("/")[2]

    @property
    def age(self) -> tuple[int, int, int]:
        """What orders checkpoints: the later the newer. Never a modification time: clocks differ, copies touch."""
        return self.start, self.step, self.epoch

    def verify(self, advance: Callable[[int], object] | None = None) -> str | None:
        """What is wrong with the file, or ``None`` when its bytes are those that were saved. Reads the whole file.

        Args:
            advance: called now and then with the number of bytes that were read since.
        """
        if not is_url(self.path):
            return find_damage(self.path, self.crc, advance)
        from polyaxon_tracking.storage.download_cache import (  # here and not above: it is for URLs alone
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
    """Save and find the checkpoints of one training, in a directory of its own.

    Each save is complete or absent, the old checkpoint goes only after the new one is on disk, and `latest` returns
    only what it has checked. The files are whatever you write; this class never looks inside. On a local disk a
    checkpoint may also be a directory of files, as several processes write that each hold a part of the state.

    The checks are for damage, not for forgery: load only checkpoints from directories you trust.

    Args:
        directory: a local directory, made with the first save, or a URL that fsspec knows, such as
            ``s3://bucket/run/checkpoints``. There files are written to ``$TMPDIR`` and uploaded, and read from copies.
        max_to_keep: how many of the newest checkpoints stay; of a training before, from which this one did not go on,
            the newest stays too.

    Raises:
        TrackingError: `max_to_keep` is not a positive number, or `directory` is empty, ``None`` or a malformed URL.

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
        if isinstance(max_to_keep, bool) or not isinstance(max_to_keep, int) or max_to_keep < 1:
            raise TrackingError(f"Received max_to_keep={max_to_keep!r}. Expected a whole number, 1 or more.")
        if not directory:
            raise TrackingError(
                f"Received directory={directory!r}. Expected a path or a URL. get_outputs_path() returns None off the "
                f'cluster: write CheckpointManager(get_outputs_path("checkpoints") or "outputs/checkpoints").'
            )
        self._directory = open_directory(directory)
        self.directory = self._directory.path
        self.max_to_keep = max_to_keep
        self._fetched: list[str] = []
        self._damaged: set[str] = set()
        self._known: set[str] | None = None  # what was there before the first save, and what was saved
        self._warned = False

    def __repr__(self) -> str:
        return f"CheckpointManager({self.directory!r}, max_to_keep={self.max_to_keep})"

    @contextlib.contextmanager
    def save(self, step: int, epoch: int = 0, *, suffix: str = ".ckpt") -> Iterator[str]:
        """Give a local path to write one checkpoint to, and commit it when the block ends.

        Args:
            step: steps done so far. A step that is not beyond the newest checkpoint's means that training began anew;
                what is saved from then on is newer than all that was there.
            epoch: epochs finished so far.
            suffix: the file's ending. Some frameworks choose the format by it.

        Raises:
            TrackingError: `step`, `epoch` or `suffix` is not usable, or the block wrote no file.
            OSError: writing failed; the checkpoints that were there are untouched.

        Where the block makes a directory at the path, the checkpoint is that directory.
        """
        step, epoch = _count("step", step), _count("epoch", epoch)
        if not _SUFFIX.fullmatch(suffix):
            raise TrackingError(f"Received suffix={suffix!r}. Expected a file's ending, such as '.ckpt'.")
        if self._known is None:
            self._known = {checkpoint.name for checkpoint in self.checkpoints()}
        with self._directory.staged(f"step={step:010d}{suffix}") as staged:
            yield staged
            crc = sync_and_checksum(staged, self._directory.sync)
            name = f"step={step:010d}-epoch={epoch}-start={self._start(step, epoch)}-crc={crc:08x}{suffix}"
            self._directory.publish(staged, name)
        self._known.add(name)
        self.release()
        self._prune(self._known)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints in the directory, newest first, read from their names alone."""
        found = [
            Checkpoint(path, int(match[1]), int(match[2]), int(match[3]), int(match[4], 16), path)
            for name in self._directory.names()
            if (match := _NAME.fullmatch(name)) and (path := f"{self.directory}/{name}")
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.age, checkpoint.path), reverse=True)

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or ``None`` where there are no checkpoints at all.

        A damaged one is skipped, with a warning, and stays where it is. Only the checkpoint returned, and damaged ones
        before it, are read. From a store they are downloaded; the copy stays until the next `save`, or `release`.

        Raises:
            TrackingError: there are checkpoints, but none is intact; the message lists them. Or the local disk has no
                room for a copy.
        """
        return next(self.iter_intact(), None)

    def iter_intact(self) -> Iterator[Checkpoint]:
        """The intact checkpoints, newest first, each checked when its turn comes; otherwise as `latest`.

        For a reader that may still refuse a file that is intact: it then takes the next one.
        """
        damaged: dict[str, str] = {}
        found_one = pruned = False
        for listed in self.checkpoints():
            try:
                checkpoint = listed._replace(path=self._directory.fetch(listed.name))
            except FileNotFoundError:
                pruned = True  # by a training that goes on, since the listing
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
                    "Skipped damaged checkpoints, using %s instead: %s", checkpoint.source, _listed(damaged)
                )
            found_one = True
            yield checkpoint
        if pruned and not found_one:
            yield from self.iter_intact()
        elif damaged and not found_one:
            raise TrackingError(
                f"Received only damaged checkpoints in {shown_path(self.directory)}: {_listed(damaged)}. Expected at "
                f"least one that is intact. Training does not start from scratch by itself then: put an intact copy "
                f"there, or, to begin anew, move these away or pass resume=False to the callback."
            )

    def release(self) -> None:
        """Remove the local copies that `latest` and `intact` made, where the directory is a URL: they have been read.

        `save` does so too, and the end of the process. A copy stays while another process of the machine needs it.
        """
        while self._fetched:
            self._directory.release(self._fetched.pop())

    def _start(self, step: int, epoch: int) -> int:
        newest = next(iter(self.checkpoints()), None)
        if newest is None:
            return 1
        return newest.start if (step, epoch) > (newest.step, newest.epoch) else newest.start + 1

    def _prune(self, known: set[str]) -> None:
        found = self.checkpoints()
        foreign = [checkpoint.path for checkpoint in found if checkpoint.name not in known]
        if foreign and not self._warned:
            self._warned = True
            _logger.warning(
                "Another training, or another callback of this one, saves its checkpoints here too, such as %s. Both "
                "keep theirs, and the next start goes on from the newest of all. Give each an outputs path of its own, "
                "or end the other",
                foreign[0],
            )
        whole = [checkpoint for checkpoint in found if checkpoint.name in known - self._damaged]
        newest = [checkpoint for checkpoint in whole if checkpoint.start == whole[0].start][: self.max_to_keep]
        # A training that began anew, perhaps by mistake, does not cost the newest of the one before.
        earlier = [checkpoint for checkpoint in whole if checkpoint.start < whole[0].start]
        kept = [*newest, *earlier[: max(1, self.max_to_keep - len(newest))]]
        for checkpoint in whole:
            if checkpoint in kept:
                continue
            try:
                self._directory.remove(checkpoint.name)
            except OSError as error:
                # The new checkpoint is safe; one too many is no reason to end a training.
                _logger.warning("The old checkpoint %s could not be removed: %s", checkpoint.path, error)


def _count(name: str, value: int) -> int:
    try:
        number = operator.index(value)  # NumPy's integers too, but no float
    except TypeError:
        number = -1
    if number < 0:
        raise TrackingError(f"Received {name}={value!r}. Expected a whole number, 0 or more.") from None
    return number


def _listed(damaged: dict[str, str]) -> str:
    return "; ".join(f"{path}: {problem}" for path, problem in damaged.items())
