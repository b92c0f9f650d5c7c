"""The classes and functions from which integrations with training frameworks are built.

Training scripts need none of these names: they use a callback, or the names that `polyaxon_tracking` exports.
"""

from polyaxon_tracking.background import BackgroundWriter
from polyaxon_tracking.storage.directory import Directory
from polyaxon_tracking.storage.opening import open_directory
from polyaxon_tracking.storage.staged import StagedFile
from polyaxon_tracking.training.hyperparameters import Hyperparameters, IfChanged, accept_hyperparameters
from polyaxon_tracking.training.memory import available_memory
from polyaxon_tracking.training.messages import different_model
from polyaxon_tracking.training.options import SaveOptions
from polyaxon_tracking.training.preemption import PreemptionHandler
from polyaxon_tracking.training.process_group import Flags, ProcessGroup
from polyaxon_tracking.training.run import Run, RunPaths
from polyaxon_tracking.training.session import Action, TrainingSession

__all__ = [
    "Action",
    "BackgroundWriter",
    "Directory",
    "Flags",
    "Hyperparameters",
    "IfChanged",
    "PreemptionHandler",
    "ProcessGroup",
    "Run",
    "RunPaths",
    "SaveOptions",
    "StagedFile",
    "TrainingSession",
    "accept_hyperparameters",
    "available_memory",
    "different_model",
    "open_directory",
]
