"""Hugging Face's Trainer with outputs, datasets and log level from the run, and checkpoints that survive."""

from polyaxon_transformers.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
