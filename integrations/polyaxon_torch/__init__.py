"""What the integrations of frameworks on torch share; no integration by itself."""

from polyaxon_torch.processes import TorchProcesses
from polyaxon_torch.random_numbers import random_state, set_random_state

__all__ = ["TorchProcesses", "random_state", "set_random_state"]
