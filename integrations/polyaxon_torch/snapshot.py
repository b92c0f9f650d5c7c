"""Saving while training goes on: from a copy of the state in host memory, in buffers that are used again."""

from __future__ import annotations

import functools
import io
import logging
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyaxon_tracking.training import BackgroundWriter, available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import timedelta

__all__ = ["Snapshot"]

_logger = logging.getLogger("polyaxon_tracking")

# Smaller tensors (counters, the states of generators) come and go; they are copied anew for every state.
_SMALL_BYTES = 1 << 16
_SAMPLED_BYTES, _SAMPLED_EVERY = 1 << 12, 1 << 18
# Saves that a buffer outlives its last use: a ModelCheckpoint of weights alone leaves those of the optimizer unused.
_KEPT_SAVES = 8


class Snapshot:
    """Copy a checkpoint in memory, and have it written in another thread.

    At most one state is in flight. Several checkpoints of one step share its buffers, since their tensors are found to
    have the same bytes; a state whose bytes have changed waits for the write of the one before.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._writer = BackgroundWriter(timeout)
        self.wait = self._writer.wait
        self.submit = self._writer.submit
        self._buffers: dict[_Key, _Buffer] = {}
        self._saves = 0
        self._in_flight: set[_Key] = set()
        self._step: int | None = None
        self._last: _Copy | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._told = False

    @property
    def failed(self) -> bool:
        """Whether a write failed whose error was not raised yet."""
        return self._writer.failed

    def save(self, what: str, checkpoint: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Have `write` called in the thread with a copy of `checkpoint`: the same object where nothing has changed.

        Where memory does not suffice for the copy, call it at once with `checkpoint` itself.

        Raises:
            BaseException: that of a write before.
        """
        copy = self._copy(checkpoint)
        if copy is None:
            self.wait()
            write(checkpoint)
        else:
            self.submit(what, lambda: write(copy.checkpoint))

    def reserve(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take the memory for a copy of `tensors` in the thread, ahead of the first save."""
        storages = dict.fromkeys(_key(tensor.untyped_storage()) for tensor in tensors if _is_plain(tensor))
        missing = [key for key in storages if key.size >= _SMALL_BYTES and key not in self._buffers]
        if not self._suffices(sum(key.size for key in missing)):
            return

        def allocate() -> None:
            for key in missing:
                self._buffers[key] = _Buffer(_allocate(key))

        self.submit("zeros to the memory for a copy of the state", allocate)
        self._step = None  # so that the first save waits for it

    def _copy(self, checkpoint: dict[str, Any]) -> _Copy | None:
        if checkpoint["global_step"] != self._step or not self._writer.pending:
            self.wait()  # which raises what went wrong, too
            self._in_flight.clear()
        structure = io.BytesIO()
        pickler = _Pickler(structure)
        pickler.dump(checkpoint)
        if not self._make_room(pickler.storages):
            return None
        self._saves += 1
        contents: list[torch.Tensor] = []
        last, self._last = self._last, None
        same_step, self._step = checkpoint["global_step"] == self._step, checkpoint["global_step"]
        if last is not None and (last.structure, len(last.contents)) != (structure.getvalue(), len(pickler.storages)):
            last = None
        for index, (key, storage) in enumerate(pickler.storages.items()):
            live = _bytes_of(storage)
            if key.size < _SMALL_BYTES:
                content = live.to("cpu", copy=True)
                same = last is not None and torch.equal(last.contents[index], content)
            else:
                buffer, version = self._buffers[key], pickler.versions[key]
                content = buffer.bytes
                same = same_step and version == buffer.version and _are_equal(content, live)
                if not same:
                    self._fill(key, live)
                buffer.used, buffer.version = self._saves, version
                same = same and last is not None and last.contents[index] is content
            contents.append(content)
            last = last if same else None
        for stream in self._streams.values():
            stream.synchronize()
        self._in_flight.update(pickler.storages)
        self._last = _Copy(structure.getvalue(), contents) if last is None else last
        return self._last

    def _fill(self, key: _Key, live: torch.Tensor) -> None:
        """Bring the buffer for `key` to the bytes of `live`, when it is not being written."""
        if key in self._in_flight and self._writer.pending:
            self.wait()
            self._in_flight.clear()
        target = self._buffers[key].bytes
        if key.device.type == "cpu":
            target.copy_(live)
            return
        # All tensors of a GPU are copied one after the other, without a pause for each.
        stream = self._streams.setdefault(key.device, torch.cuda.Stream(key.device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(key.device))
        with torch.cuda.stream(stream):
            target.copy_(live, non_blocking=True)

    def _make_room(self, storages: dict[_Key, torch.UntypedStorage]) -> bool:
        """Have a buffer for each storage; not where there is not the memory."""
        missing = [key for key in storages if key.size >= _SMALL_BYTES and key not in self._buffers]
        if not missing:
            return True
        # Tensors that are made anew for every step come with new addresses: what held their last values is free.
        unused = [key for key in self._buffers if key not in storages]
        if unused and self._writer.pending and not self._in_flight.isdisjoint(unused):
            self.wait()
            self._in_flight.clear()
        for key in [*missing]:
            taken = next((other for other in unused if other.size == key.size and other.device == key.device), None)
            if taken is not None:
                unused.remove(taken)
                missing.remove(key)
                self._buffers[key] = self._buffers.pop(taken)
        for key in unused:
            if self._buffers[key].used >= 0 and self._buffers[key].used + _KEPT_SAVES < self._saves:
                del self._buffers[key]
        if not self._suffices(sum(key.size for key in missing)):
            return False
        for key in missing:
            self._buffers[key] = _Buffer(_allocate(key))
        return True

    def _suffices(self, size: int) -> bool:
        available = available_memory()
        if size < available:
            return True
        if not self._told:
            self._told = True
            _logger.warning(
                "Saving in the foreground, while training waits: a copy of the state takes %s bytes of memory more, "
                "and %s are available",
                f"{size:,}",
                f"{available:,}",
            )
        return False


class _Key(NamedTuple):
    """What tells a storage from the others that are alive."""

    device: torch.device
    address: int
    size: int


class _Buffer:
    def __init__(self, content: torch.Tensor) -> None:
        self.bytes = content
        self.used = -1
        """The number of the save that filled it, or -1."""
        self.version = -1
        """How often what it holds a copy of had been changed in place."""


class _Copy:
    """A checkpoint apart: its structure as a pickle, and the bytes of its tensors' storages."""

    def __init__(self, structure: bytes, contents: list[torch.Tensor]) -> None:
        self.structure = structure
        self.contents = contents

    @functools.cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint put together again, on these bytes."""
        checkpoint: dict[str, Any] = _Unpickler(self.structure, self.contents).load()
        return checkpoint


class _Pickler(pickle.Pickler):
    """Pickle all but the tensors, whose storages it collects in their order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.storages: dict[_Key, torch.UntypedStorage] = {}
        self.versions: dict[_Key, int] = {}
        self._indices: dict[_Key, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not _is_plain(value):
            return None
        storage = value.untyped_storage()
        key = _key(storage)
        index = self._indices.setdefault(key, len(self._indices))
        self.storages[key] = storage
        version = -1 if value.is_inference() else value._version  # noqa: SLF001  # of the autograd notes, for users
        self.versions[key] = max(version, self.versions.get(key, -1))
        return index, value.dtype, value.storage_offset(), tuple(value.shape), value.stride(), value.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, structure: bytes, contents: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(structure))
        self._contents = contents

    def persistent_load(self, reference: Any) -> torch.Tensor:
        index, dtype, *place, requires_grad = reference
        tensor = torch.empty(0, dtype=dtype).set_(self._contents[index].untyped_storage(), *place)
        return tensor.requires_grad_(requires_grad)


def _is_plain(value: Any) -> bool:
    """Whether a tensor is nothing but a view of its storage; others are pickled as they are, bytes and all."""
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and value.device.type in ("cpu", "cuda")
        and not (value.is_quantized or value.is_conj() or value.is_neg() or vars(value))
    )


def _key(storage: torch.UntypedStorage) -> _Key:
    return _Key(storage.device, storage.data_ptr(), storage.nbytes())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _allocate(key: _Key) -> torch.Tensor:
    """Memory of the host, pinned for the copy from a GPU, and touched, so that the system has given it."""
    return torch.empty(key.size, dtype=torch.uint8, pin_memory=key.device.type == "cuda").zero_()


def _are_equal(copy: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether the bytes are the same, by samples of all parts of the tensor, compared on the device of `live`.

    What changes a tensor in place counts up its version. Only writing through ``.data`` does not, with which some swap
    averaged weights in and out between two checkpoints of a step: the samples find that.
    """
    pairs = zip(_samples(copy), _samples(live), strict=True)
    return all(torch.equal(one.to(live.device), other) for one, other in pairs)


def _samples(content: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = len(content) // _SAMPLED_EVERY
    yield content[: rows * _SAMPLED_EVERY].view(rows, _SAMPLED_EVERY)[:, :_SAMPLED_BYTES]
    yield content[-_SAMPLED_EVERY:]
