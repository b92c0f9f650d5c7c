"""One checkpoint, and the name of its file, which records what is known of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.integrity import find_damage
from polyaxon_tracking.urls import is_url

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Checkpoint", "as_checkpoint", "check_suffix", "checkpoint_name"]

# A checkpoint's name holds its step, epoch and start, and the CRC-32 of its bytes. So a checkpoint of any format is one
# file, and a listing is enough to find the newest.
# `.nan` comes before the file's ending if the weights hold NaN, and `.kept` with the UNIX time if it is kept for good.
_NAME = re.compile(
    r"step=(\d+)-epoch=(\d+)-start=(\d+)-crc=([0-9a-f]{8})(?P<nan>\.nan)?(?:\.kept(?P<kept_at>\d+))?(?:\.\w+)+"
)
_SUFFIX = re.compile(r"(?:\.\w+)+")


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
        return match is not None and match["nan"] is not None

    @property
    def kept_at(self) -> int | None:
        """The UNIX time at which the checkpoint was saved to be kept for good; ``None`` if it is not kept for good."""
        match = _NAME.fullmatch(self.name)
        return None if match is None or match["kept_at"] is None else int(match["kept_at"])

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


def as_checkpoint(directory: str, name: str) -> Checkpoint | None:
    """Return the checkpoint `name` in `directory`, or ``None`` if it is no checkpoint's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    path = f"{directory}/{name}"
    return Checkpoint(path, int(match[1]), int(match[2]), int(match[3]), int(match[4], 16), path)


def checkpoint_name(
    step: int, epoch: int, start: int, crc: int, suffix: str, *, has_nan: bool, kept_at: int | None
) -> str:
    """Return the name of a checkpoint's file. The arguments are those of `Checkpoint`."""
    nan, kept = ".nan" if has_nan else "", "" if kept_at is None else f".kept{kept_at}"
    return f"step={step:010d}-epoch={epoch}-start={start}-crc={crc:08x}{nan}{kept}{suffix}"


def check_suffix(suffix: object) -> None:
    """Raise a `TrackingError` unless `suffix` is the ending of a file's name."""
    if not (isinstance(suffix, str) and _SUFFIX.fullmatch(suffix)):
        raise TrackingError(f"Received suffix={suffix!r}. Expected a file's ending, such as '.ckpt'.")
