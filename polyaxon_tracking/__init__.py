"""Where a run's outputs, its data and other runs' outputs are, how loud it shall log; and checkpoints that survive."""

from polyaxon_tracking.environment import (
    get_data_path,
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
)
from polyaxon_tracking.errors import TrackingError

TYPE_CHECKING = False  # as `typing.TYPE_CHECKING`, without the milliseconds that importing `typing` takes
if TYPE_CHECKING:
    from polyaxon_tracking.background import BackgroundWriter
    from polyaxon_tracking.checkpoints import Checkpoint, CheckpointManager
    from polyaxon_tracking.storage.directory import Directory
    from polyaxon_tracking.storage.download_cache import cached_path
    from polyaxon_tracking.storage.opening import atomic_write, open_directory
    from polyaxon_tracking.training.memory import available_memory
    from polyaxon_tracking.training.preemption import Interruption
    from polyaxon_tracking.training.process_group import Processes, Wishes
    from polyaxon_tracking.training.run import Run

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "CheckpointManager",
    "Directory",
    "Interruption",
    "Processes",
    "Run",
    "TrackingError",
    "Wishes",
    "atomic_write",
    "available_memory",
    "cached_path",
    "get_data_path",
    "get_data_paths",
    "get_log_level",
    "get_outputs_path",
    "get_outputs_refs_paths",
    "open_directory",
]

# Imported at first use: a script that only asks for its paths starts 15 ms sooner without `logging` and the rest.
_LATER = {
    "BackgroundWriter": "background",
    "Checkpoint": "checkpoints",
    "CheckpointManager": "checkpoints",
    "Directory": "files",
    "Interruption": "interruption",
    "Processes": "processes",
    "Run": "run",
    "Wishes": "processes",
    "atomic_write": "files",
    "available_memory": "memory",
    "cached_path": "cache",
    "open_directory": "files",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
