"""The PyTorch Lightning callback of polyaxon-tracking."""

from polyaxon_lightning import framework as _framework  # noqa: F401  # first: its error names the extra to install

# isort: split
from polyaxon_lightning.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
