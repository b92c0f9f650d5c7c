"""URLs and local paths, and names joined below them."""

from __future__ import annotations

import os

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_path

__all__: list[str] = []


def join_below(root: str, *parts: str) -> str:
    """Join `parts` below `root`, a path or a URL; raise if a part would leave `root`."""
    for part in parts:
        if part.startswith("/") or "://" in part or ".." in part.replace("\\", "/").split("/"):
            raise TrackingError(
                f"Received the name {shown_path(part)} to join below the path {shown_path(root)}. Expected a "
                f"relative name that stays below it, such as 'checkpoints/best.pt': leave out '..', a leading '/' and '://'."
            )
    names = [part.strip("/") for part in parts if part]
    return "/".join([root.rstrip("/"), *names]) if names else root


def is_url(path: str) -> bool:
    """Return whether `path` is the URL of an object store; a ``file://`` URL is not."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """Return `path` with ``~`` expanded and without ``file://``, which frameworks would take for a directory's name."""
    return os.path.expanduser(path.removeprefix("file://"))
