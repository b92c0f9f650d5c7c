"""Save while training continues, from a copy of the state in host memory whose buffers are reused."""

from __future__ import annotations

import functools
import io
import logging
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyaxon_tracking.training import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polyaxon_tracking.training import BackgroundWriter

__all__ = ["Snapshot", "tensors_in"]

_logger = logging.getLogger("polyaxon_tracking")

# Smaller tensors (counters, states of random number generators) come and go, so they are copied again for every save.
_SMALL_BYTES = 1 << 16
# The devices on which a tensor is the bytes of its storage. Other devices may store it in their own layout.
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_SAMPLED_BYTES, _SAMPLED_EVERY = 1 << 12, 1 << 18
# Saves after which an unused buffer is freed. A ModelCheckpoint that saves only weights does not use the buffers of the
# optimizer, which the next save of the training state needs again.
_SAVES_UNTIL_FREED = 8


class Snapshot:
    """Copies a checkpoint in memory and writes the copy in a background thread.

    At most one step's copy is being written. Several checkpoints of the same step share buffers, because their tensors
    have the same bytes. If a tensor's bytes have changed, a save waits for the write of the previous save.

    Args:
        writer: the thread that writes the copy.
    """

    def __init__(self, writer: BackgroundWriter) -> None:
        self._writer = writer
        self.wait = self._writer.wait
        self.submit = self._writer.submit
        self._buffers: dict[_Key, _Buffer] = {}
        self._saves = 0
        self._in_flight: set[_Key] = set()
        self._step: int | None = None
        self._last: _CheckpointCopy | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._warned = False

    @property
    def failed(self) -> bool:
        """Return whether a write has failed and its error has not been raised yet."""
        return self._writer.failed

    def save(self, what: str, step: int, checkpoint: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Call `write` in the background thread with a copy of `checkpoint`.

        The copy is the same object as in the previous save if nothing has changed. If there is not enough memory for
        the copy, `write` is called at once in this thread, with `checkpoint` itself.

        Args:
            what: what `write` writes, for messages.
            step: the step of the checkpoint.
            checkpoint: the checkpoint.
            write: a function that saves the checkpoint that it is given.

        Raises:
            BaseException: the error of an earlier write.
        """
        copy = self._copy(step, checkpoint)
        if copy is None:
            self.wait()
            write(checkpoint)
        else:
            self.submit(what, lambda: write(copy.checkpoint))

    def reserve(self, tensors: Iterable[torch.Tensor]) -> None:
        """Allocate the memory for a copy of `tensors` in the background thread, before the first save needs it."""
        storages = dict.fromkeys(_key(tensor.untyped_storage()) for tensor in tensors if _is_plain(tensor))
        missing = [key for key in storages if key.size >= _SMALL_BYTES and key not in self._buffers]
        if not self._has_memory_for(sum(key.size for key in missing)):
            return

        def allocate() -> None:
            for key in missing:
                self._buffers[key] = _Buffer(_allocate(key))

        self.submit("zeros to the memory for a copy of the state", allocate)
        self._step = None  # so that the first save waits for the allocation

    def free(self) -> None:
        """Free the memory of the copy, because training has ended. All writes must be done."""
        self._buffers.clear()
        self._last = None

    def _copy(self, step: int, checkpoint: dict[str, Any]) -> _CheckpointCopy | None:
        if step != self._step or not self._writer.pending:
            self.wait()  # also raises the error of an earlier write
            self._in_flight.clear()
        structure = io.BytesIO()
        pickler = _Pickler(structure)
        pickler.dump(checkpoint)
        if not self._ensure_buffers(pickler.storages):
            return None
        self._saves += 1
        contents: list[torch.Tensor] = []
        last, self._last = self._last, None
        same_step, self._step = step == self._step, step
        if last is not None and (last.structure, len(last.contents)) != (structure.getvalue(), len(pickler.storages)):
            last = None
        for index, (key, storage) in enumerate(pickler.storages.items()):
            live = _storage_bytes(storage)
            if key.size < _SMALL_BYTES:
                content = live.to("cpu", copy=True)
                same = last is not None and torch.equal(last.contents[index], content)
            else:
                buffer, version = self._buffers[key], pickler.versions[key]
                content = buffer.bytes
                same = same_step and version == buffer.version and _are_equal(content, live)
                if not same:
                    self._fill(key, live)
                buffer.last_used, buffer.version = self._saves, version
                same = same and last is not None and last.contents[index] is content
            contents.append(content)
            last = last if same else None
        for stream in self._streams.values():
            stream.synchronize()
        self._in_flight.update(pickler.storages)
        self._last = _CheckpointCopy(structure.getvalue(), contents) if last is None else last
        return self._last

    def _fill(self, key: _Key, live: torch.Tensor) -> None:
        """Copy the bytes of `live` to the buffer for `key`, after waiting if that buffer is being written."""
        if key in self._in_flight and self._writer.pending:
            self.wait()
            self._in_flight.clear()
        target = self._buffers[key].bytes
        if key.device.type != "cuda":
            target.copy_(live)
            return
        # All tensors of a CUDA device are copied in one stream, which is synchronized only once for all of them.
        stream = self._streams.setdefault(key.device, torch.cuda.Stream(key.device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(key.device))
        with torch.cuda.stream(stream):
            target.copy_(live, non_blocking=True)

    def _ensure_buffers(self, storages: dict[_Key, torch.UntypedStorage]) -> bool:
        """Ensure a buffer for each of the `storages`, and return whether there is enough memory for them."""
        missing = [key for key in storages if key.size >= _SMALL_BYTES and key not in self._buffers]
        if not missing:
            return True
        # Tensors created in every step have new addresses, so that the buffers of their previous values can be reused.
        unused = [key for key in self._buffers if key not in storages]
        if unused and self._writer.pending and not self._in_flight.isdisjoint(unused):
            self.wait()
            self._in_flight.clear()
        for key in [*missing]:
            reusable = next((other for other in unused if other.size == key.size and other.device == key.device), None)
            if reusable is not None:
                unused.remove(reusable)
                missing.remove(key)
                self._buffers[key] = self._buffers.pop(reusable)
        for key in unused:
            if self._buffers[key].last_used >= 0 and self._buffers[key].last_used + _SAVES_UNTIL_FREED < self._saves:
                del self._buffers[key]
        if not self._has_memory_for(sum(key.size for key in missing)):
            return False
        for key in missing:
            self._buffers[key] = _Buffer(_allocate(key))
        return True

    def _has_memory_for(self, size: int) -> bool:
        available = available_memory()
        if size < available:
            return True
        if not self._warned:
            self._warned = True
            _logger.warning(
                "Saving in the foreground, while training waits: a copy of the state takes %s bytes of memory more, "
                "and %s are available",
                f"{size:,}",
                f"{available:,}",
            )
        return False


class _Key(NamedTuple):
    """Identifies a tensor's storage among all storages that exist at the same time."""

    device: torch.device
    address: int
    size: int


class _Buffer:
    def __init__(self, content: torch.Tensor) -> None:
        self.bytes = content
        self.last_used = -1
        """The number of the last save that used this buffer, or -1."""
        self.version = -1
        """The tensor's version when it was copied, which counts the tensor's changes in place."""


class _CheckpointCopy:
    """A copied checkpoint: its structure as a pickle, and the bytes of its tensors' storages."""

    def __init__(self, structure: bytes, contents: list[torch.Tensor]) -> None:
        self.structure = structure
        self.contents = contents

    @functools.cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint, rebuilt with tensors that share the copied bytes."""
        checkpoint: dict[str, Any] = _Unpickler(self.structure, self.contents).load()
        return checkpoint


class _Pickler(pickle.Pickler):
    """Pickles everything except the tensors, and collects the storages of these in the order of pickling."""

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
        version = -1 if value.is_inference() else value._version  # noqa: SLF001  # documented in torch's autograd notes
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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested mappings and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a tensor that only views its storage; all other values are pickled with their bytes."""
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and value.device.type in _DEVICES
        and not (value.is_quantized or value.is_conj() or value.is_neg() or vars(value))
    )


def _key(storage: torch.UntypedStorage) -> _Key:
    return _Key(storage.device, storage.data_ptr(), storage.nbytes())


def _storage_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _allocate(key: _Key) -> torch.Tensor:
    """Allocate host memory for the storage of `key`, pinned if the storage is on a CUDA device.

    The memory is zeroed because the system provides memory only when it is written to.
    """
    return torch.empty(key.size, dtype=torch.uint8, pin_memory=key.device.type == "cuda").zero_()


def _are_equal(copy: torch.Tensor, live: torch.Tensor) -> bool:
    """Return whether samples from all parts of both tensors are equal, comparing on the device of `live`.

    Samples suffice because every change of a tensor in place increases its version, which is compared separately. Only
    writes through ``.data`` do not increase the version. Some callbacks use such writes to swap averaged weights in and
    out between two checkpoints of the same step, and the samples detect that swap.
    """
    pairs = zip(_samples(copy), _samples(live), strict=True)
    return all(torch.equal(copied.to(live.device), current) for copied, current in pairs)


def _samples(content: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = len(content) // _SAMPLED_EVERY
    yield content[: rows * _SAMPLED_EVERY].view(rows, _SAMPLED_EVERY)[:, :_SAMPLED_BYTES]
    yield content[-_SAMPLED_EVERY:]
