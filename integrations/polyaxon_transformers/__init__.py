"""Hugging Face's Trainer with outputs, datasets and log level from the run, and checkpoints that survive."""

from polyaxon_transformers import framework as _framework  # noqa: F401  # first: its error names the extra to install

# isort: split
from polyaxon_transformers.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
