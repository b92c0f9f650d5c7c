"""The handwritten digits that scikit-learn brings along: 1,797 images of 8 x 8 pixels, ten classes.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np

# The directory in which scikit-learn keeps the file, for use off the cluster.
LOCAL = os.path.join(os.path.dirname(str(find_spec("sklearn").origin)), "datasets", "data")  # type: ignore[union-attr]


def load(directory: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Read ``digits.csv.gz`` in `directory`: images as float32 in [0, 1] of shape (n, 64), labels of shape (n,).

    Returns:
        1,500 images and labels to train on, and 297 to test with.
    """
    table = np.loadtxt(os.path.join(directory, "digits.csv.gz"), delimiter=",", dtype=np.int64)
    table = np.random.default_rng(0).permutation(table)
    images, labels = (table[:, :-1] / 16).astype(np.float32), table[:, -1]
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
