"""The error that every function of this package raises, and the masking of what it quotes."""

from polyaxon_tracking.redaction import shown_path

__all__ = ["TrackingError"]


class TrackingError(ValueError):
    """What the run's environment says, or what was asked of it, cannot be used.

    The message says what was received (shortened, secrets masked), what was expected, and what to do.
    """


def closest(name: str, names: list[str]) -> str:
    """``" Did you mean 'digits'?"``, or nothing where no name is near."""
    import difflib  # here and not above: 3 ms that only an error message needs

    near = difflib.get_close_matches(name, names, n=1)
    if not near:  # a difference in case alone counts as near
        near = [known for known in names if known.lower() == name.lower()]
    return f" Did you mean {shown_path(near[0])}?" if near else ""
