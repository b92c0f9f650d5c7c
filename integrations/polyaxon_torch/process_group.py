"""Collectives between the processes of ``torch.distributed``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from polyaxon_tracking.training import Flags, ProcessGroup

__all__ = ["TorchProcessGroup"]

_T = TypeVar("_T")

# The default timeout of torch's collectives with gloo.
_GLOO_TIMEOUT = timedelta(minutes=30)


class TorchProcessGroup(ProcessGroup):
    """The processes of ``torch.distributed`` that train one model, and the collectives between them.

    The collectives use their own process group with the gloo backend, in host memory. Therefore they do not wait for a
    GPU and do not mix with the framework's collectives. With only one process, every method returns at once.

    Args:
        write_timeout: maximum time that rank 0 waits for its pending writes. The other ranks wait 30 minutes longer.
    """

    def __init__(self, write_timeout: timedelta) -> None:
        super().__init__()
        self.is_distributed = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        self.rank = distributed.get_rank() if self.is_distributed else 0
        self._group = (
            distributed.new_group(backend="gloo", timeout=write_timeout + _GLOO_TIMEOUT)
            if self.is_distributed
            else None
        )
        self._flags: tuple[torch.Tensor, Any] | None = None

    def gather(self, value: _T) -> list[_T]:
        """Return the `value` of each process, ordered by rank, or only this process's `value` after `close`.

        This method waits until every process has called it.
        """
        if self._group is None:
            return [value]
        found: list[Any] = [None] * distributed.get_world_size()
        with self.waiting():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def reduce_flags(self, flags: Flags) -> Flags:
        """Contribute this process's `flags`, and return the combined flags of the previous call.

        No process waits for the collective that this call starts. With one process, `flags` are returned at once.
        """
        if self._group is None:
            return flags
        previous = self.wait_for_flags()
        numbers = torch.tensor(flags, dtype=torch.int64)
        work = distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._flags = numbers, work
        return previous

    def wait_for_flags(self) -> Flags:
        """Wait for the combined flags of the last `reduce_flags`, and return them.

        If these flags were returned already, return flags that ask for nothing.
        """
        pending, self._flags = self._flags, None
        if pending is None:
            return Flags()
        numbers, work = pending
        work.wait()
        return Flags(*numbers.tolist())

    def raise_on_all(self, error: BaseException | None) -> None:
        """Raise `error` in this process and a RuntimeError that quotes `error` in the others.

        If any process has an error, every process closes the process group. If no process has one, return.

        Raises:
            RuntimeError: another process has an error.
        """
        try:
            super().raise_on_all(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Destroy the process group and its threads.

        A thread that frees a tensor while the interpreter exits would abort the process.
        """
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = self._flags = None
