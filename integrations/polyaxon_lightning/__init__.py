"""The PyTorch Lightning callback of polyaxon-tracking."""

from polyaxon_lightning.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
