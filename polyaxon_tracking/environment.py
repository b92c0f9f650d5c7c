"""The paths of the run's outputs and data, and its log level, read from the environment.

The variables are those of Polyaxon 0.4-0.6 (``polypod/templates/env_vars.py``) and of 1.x and 2.x
(``_env_vars/keys.py``, ``_contexts/paths.py``). They are read at every call and never written.
"""

from __future__ import annotations

import os

from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import shown_path, shown_value
from polyaxon_tracking.urls import corrected_url, is_url, join_below, path_text

__all__ = [
    "get_data_paths",
    "get_log_level",
    "get_outputs_path",
    "get_outputs_refs_paths",
]

OUTPUTS_PATH = "POLYAXON_RUN_OUTPUTS_PATH"
REFS_OUTPUTS_PATHS = "POLYAXON_REFS_OUTPUTS_PATHS"
DATA_PATHS = "POLYAXON_RUN_DATA_PATHS"
LOG_LEVEL = "POLYAXON_LOG_LEVEL"
NO_OP = "POLYAXON_NO_OP"
RUN_INSTANCE = "POLYAXON_RUN_INSTANCE"
IS_OFFLINE = "POLYAXON_IS_OFFLINE"
CONTEXT_ROOT = "POLYAXON_CONTEXT_ROOT"
OFFLINE_ROOT = "POLYAXON_OFFLINE_ROOT"

DEFAULT_CONTEXT_ROOT = "/plx-context"
DEFAULT_OFFLINE_ROOT = "/tmp/plx/offline"  # noqa: S108  # the platform's

# All variables that the getters read.
VARIABLES = (
    OUTPUTS_PATH,
    REFS_OUTPUTS_PATHS,
    DATA_PATHS,
    LOG_LEVEL,
    NO_OP,
    RUN_INSTANCE,
    IS_OFFLINE,
    CONTEXT_ROOT,
    OFFLINE_ROOT,
)

LOG_LEVELS = ("NOTSET", "DEBUG", "INFO", "WARN", "WARNING", "ERROR", "FATAL", "CRITICAL")

# The numbers that have a name in `logging`.
_NAMED_LEVELS = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}

REFS_KEYS = ("jobs", "experiments")

_TRUE = ("true", "1", "t", "yes", "y", "on")
_FALSE = ("false", "0", "f", "no", "n", "off")


def get_outputs_path(*parts: str | os.PathLike[str]) -> str | None:
    """Return the run's outputs path: ``POLYAXON_RUN_OUTPUTS_PATH``, e.g. ``/outputs/user/project/experiments/7``.

    Polyaxon 1.x and 2.x do not set this variable. There the path is ``<context root>/artifacts/<uuid>/outputs``, with
    the uuid in ``POLYAXON_RUN_INSTANCE`` (``owner.project.runs.<uuid>``).

    Args:
        parts: names to join below the outputs path, such as ``"checkpoints", "best.pt"``, or relative path objects.

    Returns:
        The path, always a ``str`` because it may be a URL (``s3://``, ``gs://``, ``wasbs://``, ``abfs://``) that
        ``pathlib.Path`` would mangle; ``None`` off the cluster and if ``POLYAXON_NO_OP`` is true.

    Raises:
        TrackingError: ``POLYAXON_RUN_INSTANCE`` is malformed, or `parts` are no names or leave the outputs path; or, as
            in every getter, ``POLYAXON_NO_OP`` is neither true nor false.

    Examples:
        >>> os.environ["POLYAXON_RUN_OUTPUTS_PATH"] = "s3://bucket/user/project/experiments/7"
        >>> get_outputs_path("checkpoints", "best.pt")
        's3://bucket/user/project/experiments/7/checkpoints/best.pt'
    """
    names = [path_text(part, "part") if part != "" else "" for part in parts]
    if is_true(NO_OP):
        return None
    root = _path_of(OUTPUTS_PATH) or _outputs_path_of_instance()
    if root is None or not parts:
        return root
    return join_below(root, *names)


def get_outputs_refs_paths() -> dict[str, list[str]] | None:
    """Return other runs' outputs paths: ``POLYAXON_REFS_OUTPUTS_PATHS``, e.g. ``{"experiments": ["/outputs/1"]}``.

    Returns:
        Paths (or URLs) by kind, ``"jobs"`` and ``"experiments"``, in the order in which the user asked for them. The
        platform omits a kind without references. ``None`` if the variable is not set: there are no references at all.

    Raises:
        TrackingError: the variable is not JSON, or not an object of lists of paths.

    Examples:
        >>> os.environ["POLYAXON_REFS_OUTPUTS_PATHS"] = '{"jobs": ["/outputs/jobs/12"]}'
        >>> get_outputs_refs_paths()
        {'jobs': ['/outputs/jobs/12']}
    """
    expected = """a JSON object of lists of paths, such as {"jobs": ["/outputs/12"], "experiments": ["/outputs/7"]}"""
    refs = _json_object(REFS_OUTPUTS_PATHS, expected)
    if refs is None:
        return None
    for kind in refs:
        if kind not in REFS_KEYS:
            problem = f"it has the key {shown_value(kind)}, which is neither {' nor '.join(map(repr, REFS_KEYS))}"
            raise _malformed(REFS_OUTPUTS_PATHS, expected, problem, closest(kind, list(REFS_KEYS)))
    paths: dict[str, list[str]] = {}
    for kind, listed in refs.items():
        if listed is None:  # the platform writes its None as JSON's null
            continue
        if not isinstance(listed, list) or not all(isinstance(path, str) and path.strip() for path in listed):
            raise _malformed(REFS_OUTPUTS_PATHS, expected, f"{kind!r} is not a list of paths")
        for path in listed:
            _check_slashes(REFS_OUTPUTS_PATHS, expected, path)
        paths[kind] = listed
    return paths


def get_data_paths() -> dict[str, str] | None:
    """Return the paths of the run's data: ``POLYAXON_RUN_DATA_PATHS``, e.g. ``{"digits": "/data/digits"}``.

    Returns:
        Paths (or bucket URLs) by the name that the cluster's administrator gave the data; ``None`` off the cluster.

    Raises:
        TrackingError: the variable is not JSON, or not an object of paths.

    Examples:
        >>> os.environ["POLYAXON_RUN_DATA_PATHS"] = '{"digits": "/data/digits", "faces": "gs://faces"}'
        >>> get_data_paths()
        {'digits': '/data/digits', 'faces': 'gs://faces'}
    """
    expected = """a JSON object of paths by name, such as {"digits": "/data/digits", "faces": "gs://faces"}"""
    paths = _json_object(DATA_PATHS, expected)
    if paths is None:
        return None
    for name, path in paths.items():
        if type(path) is not str or not path or path.isspace():
            raise _malformed(DATA_PATHS, expected, f"the value of {shown_value(name)} is not a path")
        _check_slashes(DATA_PATHS, expected, path)
    return paths  # type: ignore[return-value]  # every value was just found to be a str


def get_log_level() -> str | int | None:
    """Return the log level: ``POLYAXON_LOG_LEVEL``, e.g. ``INFO``. ``logging`` accepts the returned value as a level.

    Returns:
        One of ``NOTSET DEBUG INFO WARN WARNING ERROR FATAL CRITICAL`` in capitals, whatever the case of the variable. A
        number is returned as its name (``10`` as ``"DEBUG"``), or as an ``int`` if it has none (``15``). ``None`` if
        the polyaxonfile sets no level.

    Raises:
        TrackingError: the variable is neither the name of a level nor a number.

    Examples:
        >>> os.environ["POLYAXON_LOG_LEVEL"] = "info"
        >>> get_log_level()
        'INFO'
    """
    if is_true(NO_OP):
        return None
    level = value_of(LOG_LEVEL)
    if level is None:
        return None
    advice = "Correct `logging: level:` in the polyaxonfile, or unset the variable."
    return checked_log_level(level, LOG_LEVEL, advice)


def checked_log_level(level: str, source: str, advice: str) -> str | int:
    """Return `level`, which came from `source`, as `get_log_level` does.

    Raises:
        TrackingError: `level` is neither the name of a level nor a number.
    """
    name = level.strip().upper()
    if name in LOG_LEVELS:
        return name
    if name.isascii() and name.isdecimal() and len(name) <= len("1000"):
        return _NAMED_LEVELS.get(int(name), int(name))
    raise TrackingError(
        f"{source} was received as {shown_value(level)}. Expected one of {', '.join(LOG_LEVELS)} (any case) or a "
        f"number, such as 20.{closest(name, list(LOG_LEVELS))} {advice}"
    )


def _outputs_path_of_instance() -> str | None:
    instance = value_of(RUN_INSTANCE)
    if instance is None:
        return None
    try:
        owner, project, runs, uuid = instance.strip().split(".")
    except ValueError:
        owner = project = runs = uuid = ""
    if not (owner and project and runs == "runs" and _is_uuid(uuid)):
        raise TrackingError(
            f"{RUN_INSTANCE} was received as {shown_value(instance)}. Expected owner.project.runs.<uuid>, four parts "
            f"between dots, as Polyaxon 1.x and 2.x set it. Set {OUTPUTS_PATH} to say directly where the outputs go, "
            f"or unset {RUN_INSTANCE} off the cluster."
        )
    if is_true(IS_OFFLINE):
        return join_below(_path_of(OFFLINE_ROOT) or DEFAULT_OFFLINE_ROOT, "runs", uuid, "outputs")
    return join_below(_path_of(CONTEXT_ROOT) or DEFAULT_CONTEXT_ROOT, "artifacts", uuid, "outputs")


def _is_uuid(text: str) -> bool:
    """Return whether `text` may be a run's uuid. It becomes part of a path, so it must not contain ``..`` or ``/``."""
    return text.isascii() and text.replace("-", "").replace("_", "").isalnum()


def value_of(variable: str) -> str | None:
    """Return the variable's value; blank and JSON's ``null`` (as the platform writes its ``None``) count as unset."""
    value = os.environ.get(variable)
    if value is None or not (stripped := value.strip()) or stripped == "null":
        return None
    return value


def _path_of(variable: str) -> str | None:
    """Return the path in the variable, without surrounding white space; in a local path, ``~`` is expanded."""
    path = (value_of(variable) or "").strip()
    _check_slashes(variable, "a path, or a URL such as s3://bucket/run", path)
    return (path if is_url(path) else os.path.expanduser(path)) or None


def is_true(variable: str) -> bool:
    """Return whether the variable is set to one of the words that mean yes.

    Raises:
        TrackingError: the variable is set to a word that means neither yes nor no.
    """
    value = value_of(variable)
    word = "false" if value is None else value.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise TrackingError(
        f"{variable} was received as {shown_value(os.environ[variable])}. Expected one of {', '.join(_TRUE)}, or of "
        f"{', '.join(_FALSE)} (any case). Correct the variable, or unset it, which means false."
    )


def _json_object(variable: str, expected: str) -> dict[str, object] | None:
    if is_true(NO_OP):
        return None
    text = value_of(variable)
    if text is None:
        return None
    import json  # here and not above: it would double the time to import this package

    try:
        value = json.loads(text)
    except RecursionError:
        raise _malformed(variable, expected, "it is nested too deeply") from None
    except json.JSONDecodeError as error:
        # `from None`: the error holds the whole text, including secrets
        problem = f"it is not JSON: {error.msg} at character {error.pos}"
        raise _malformed(variable, expected, problem) from None
    except ValueError:  # a number with more digits than Python converts
        raise _malformed(variable, expected, "it is not JSON that Python can read") from None
    if not isinstance(value, dict):
        raise _malformed(variable, expected, "it is not an object")
    return value


def _check_slashes(variable: str, expected: str, path: str) -> None:
    """Raise if `path` is a URL with one slash: it would be a local directory, which is lost with the pod."""
    if url := corrected_url(path.strip()):
        problem = "a URL has two slashes after its scheme"
        raise _malformed(variable, expected, problem, f" Did you mean {shown_path(url)}?")


def _malformed(variable: str, expected: str, problem: str, hint: str = "") -> TrackingError:
    return TrackingError(
        f"{variable} was received as {shown_value(os.environ[variable])}: {problem}. Expected {expected}.{hint} "
        f"Correct the variable, or unset it off the cluster."
    )
