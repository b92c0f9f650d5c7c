"""The Keras callback of polyaxon-tracking."""

from polyaxon_keras import framework as _framework  # noqa: F401  # first: its error names the extra to install

# isort: split
from polyaxon_keras.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
