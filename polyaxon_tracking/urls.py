"""URLs and local paths, and names joined below them."""

from __future__ import annotations

import os

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import mask_urls, shown_path

__all__: list[str] = []

# The schemes after which a path is meant to be a URL even if no slash follows.
_SCHEMES = ("s3", "s3a", "s3n", "gs", "gcs", "wasb", "wasbs", "abfs", "abfss", "az", "http", "https", "file")


def path_text(path: object, argument: str, advice: str = "Give a string, or a pathlib.Path for a local path.") -> str:
    """Return `path`, the value of `argument`, as a string.

    Raises:
        TrackingError: `path` is neither a string nor a path object, or is empty. The message ends with `advice`.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, str) and text.strip():
        return text
    raise TrackingError(f"Received {argument}={mask_urls(repr(path))}. Expected a path or a URL. {advice}")


def join_below(root: str, *parts: str) -> str:
    """Join `parts` below `root`, a path or a URL; raise if a part would leave `root`."""
    for part in parts:
        is_url_like = "://" in part or corrected_url(part)
        if part.startswith("/") or is_url_like or ".." in part.replace("\\", "/").split("/"):
            raise TrackingError(
                f"Received the name {shown_path(part)} to join below the path {shown_path(root)}. Expected a "
                f"relative name that stays below it, such as 'checkpoints/best.pt': leave out '..', a leading '/' and '://'."
            )
    names = [part.strip("/") for part in parts if part]
    return "/".join([root.rstrip("/"), *names]) if names else root


def is_url(path: str) -> bool:
    """Return whether `path` is the URL of an object store; a ``file://`` URL is not."""
    return "://" in path and not path.startswith("file://")


def corrected_url(path: str) -> str | None:
    """Return the URL that `path` is meant to be, if it has one slash after its scheme, or none; otherwise ``None``.

    Such a path would be a local directory with the name ``s3:``. ``pathlib.Path`` makes it of a URL.
    """
    scheme, colon, rest = path.partition(":")
    # A scheme of one letter is a drive of Windows.
    if not colon or rest.startswith("//") or len(scheme) < 2 or not (scheme[0].isalpha() and scheme.isascii()):  # noqa: PLR2004
        return None
    is_scheme = scheme.replace("+", "").replace("-", "").replace(".", "").isalnum()
    if is_scheme and (rest.startswith("/") or scheme.lower() in _SCHEMES):
        return f"{scheme}://{'/' if scheme.lower() == 'file' else ''}{rest.lstrip('/')}"
    return None


def local_path(path: str) -> str:
    """Return `path` with ``~`` expanded and without ``file://``, which frameworks would take for a directory's name.

    Raises:
        TrackingError: `path` is a URL that lacks a slash.
    """
    if url := corrected_url(path):
        raise TrackingError(
            f"Received the path {shown_path(path)}. Expected a URL with two slashes, {shown_path(url)}: pathlib.Path "
            f"removes one of them, so give the URL as a string. For a local directory of this name, begin with './'."
        )
    return os.path.expanduser(path.removeprefix("file://"))
