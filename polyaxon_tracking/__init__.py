"""The paths of a run's outputs, data and references, its log level, and checkpoints that survive a crash."""

from polyaxon_tracking.environment import (
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
)
from polyaxon_tracking.errors import TrackingError

TYPE_CHECKING = False  # as `typing.TYPE_CHECKING`, without the milliseconds that importing `typing` takes
if TYPE_CHECKING:
    from polyaxon_tracking.checkpoint_names import Checkpoint
    from polyaxon_tracking.checkpoints import CheckpointManager
    from polyaxon_tracking.datasets import get_data_path
    from polyaxon_tracking.storage.download_cache import cached_path
    from polyaxon_tracking.storage.opening import atomic_write
    from polyaxon_tracking.training.preemption import PreemptionHandler
    from polyaxon_tracking.training.step_loop import StepLoop

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "PreemptionHandler",
    "StepLoop",
    "TrackingError",
    "atomic_write",
    "cached_path",
    "get_data_path",
    "get_data_paths",
    "get_log_level",
    "get_outputs_path",
    "get_outputs_refs_paths",
]

# Imported at first use, because a script that only needs its paths starts 15 ms faster without these modules.
_MODULES = {
    "Checkpoint": "checkpoint_names",
    "CheckpointManager": "checkpoints",
    "PreemptionHandler": "training.preemption",
    "StepLoop": "training.step_loop",
    "atomic_write": "storage.opening",
    "cached_path": "storage.download_cache",
    "get_data_path": "datasets",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
