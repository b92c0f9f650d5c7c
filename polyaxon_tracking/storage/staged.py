"""A file that is being written: it appears in its directory, complete, only when it is committed."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from polyaxon_tracking.storage.write_errors import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.storage.locks import StagingDirectory

__all__ = ["StagedFile"]


class StagedFile:
    """A file or directory that is being written in a staging directory. Any thread may commit or discard it.

    `Directory.stage` and `CheckpointManager.stage` create it. Each must be committed or discarded; the staging
    directory of a killed process is removed later.

    Args:
        staging: the staging directory, which belongs only to this file.
        name: the name of the file in the staging directory.
        target: the path or URL of the finished file, for messages.
        publish: takes `path`, makes its content durable and moves it to its directory.

    Examples:
        >>> from polyaxon_tracking import CheckpointManager
        >>> staged = CheckpointManager("checkpoints").stage(step=100, suffix=".txt")
        >>> with staged.writing() as path:
        ...     _ = Path(path).write_text("weights of step 100")
        >>> staged.commit()  # in another thread, perhaps
        >>> CheckpointManager("checkpoints").latest().step
        100
    """

    def __init__(self, staging: StagingDirectory, name: str, target: str, publish: Callable[[str], None]) -> None:
        self.path = os.path.join(staging.path, name)
        """The local path to write to."""
        self._staging = staging
        self._target = target
        self._publish = publish

    @contextlib.contextmanager
    def writing(self) -> Iterator[str]:
        """Yield `path`. If the ``with`` block raises, discard the file, and name the finished file in the error.

        Raises:
            OSError: writing failed; if there was too little room, the message says how much is free.
        """
        try:
            with explained(self._target, self.path):
                yield self.path
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        """Make the file durable and put it in its directory, where it replaces a file with the same name.

        Raises:
            TrackingError: no file was written to `path`.
            OSError: writing failed; the previous file is untouched.
        """
        with self.writing():
            self._publish(self.path)
        self.discard()

    def discard(self) -> None:
        """Remove what was written, unless it is committed. Calling this method again does nothing."""
        self._staging.remove()
