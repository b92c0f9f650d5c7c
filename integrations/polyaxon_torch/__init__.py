"""What the integrations of frameworks on torch share; no integration by itself."""

from polyaxon_torch.lazy import differing_shapes, settle_lazy_layers
from polyaxon_torch.processes import TorchProcesses
from polyaxon_torch.random_numbers import random_state, set_random_state

__all__ = ["TorchProcesses", "differing_shapes", "random_state", "set_random_state", "settle_lazy_layers"]
