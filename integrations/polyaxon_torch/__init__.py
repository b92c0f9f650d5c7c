"""What the integrations of frameworks on torch share; no integration by itself."""

from polyaxon_torch.processes import TorchProcesses

__all__ = ["TorchProcesses"]
