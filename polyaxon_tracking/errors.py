"""The error that this package raises for unusable input, and suggestions for misspelt names."""

from polyaxon_tracking.redaction import shown_path

__all__ = ["TrackingError"]


class TrackingError(ValueError):
    """A value in the run's environment, or an argument, cannot be used.

    The message states the received value (shortened, secrets masked), the expected value, and what to do.
    """


def closest(name: str, names: list[str]) -> str:
    """Return ``" Did you mean 'digits'?"`` with the closest of `names`, or an empty string if none is similar."""
    import difflib  # here and not above: it takes 3 ms, and only error messages need it

    near = difflib.get_close_matches(name, names, n=1)
    if not near:  # a name that differs only in case is also similar
        near = [known for known in names if known.lower() == name.lower()]
    return f" Did you mean {shown_path(near[0])}?" if near else ""
