"""Choose between Lightning's two packages: a Trainer accepts only the classes of its own package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["pl"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _package() -> str:
    """Return the package that the user imported; if neither or both are imported, the first that is installed."""
    imported = [name for name in _PACKAGES if name in sys.modules]
    if len(imported) == 1:
        return imported[0]
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0])]
    if not installed:
        raise ModuleNotFoundError(
            "polyaxon_lightning needs PyTorch Lightning, and neither `lightning` nor `pytorch_lightning` is installed. "
            'Install it with: pip install "polyaxon-tracking[lightning]"',
            name="lightning",
        )
    return installed[0]


if not TYPE_CHECKING:
    pl = importlib.import_module(_package())
