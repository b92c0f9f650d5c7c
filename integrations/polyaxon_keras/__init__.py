"""The Keras callback of polyaxon-tracking."""

from polyaxon_keras.callback import PolyaxonCallback

__all__ = ["PolyaxonCallback"]
