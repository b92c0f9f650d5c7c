"""The commands and their options."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import mask_secrets, mask_urls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

__all__ = ["app"]

# Something is wrong with what was looked at; or it could not be looked at, or started. Typer exits with the latter too.
_WRONG, _UNUSABLE = 1, 2

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they show the values of variables, secrets included
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # here and not above: `run` is to start fast

        with _standard_output():
            print(version("polyaxon-tracking"))
        raise typer.Exit


@app.callback()
def _command(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look at the run that polyaxon-tracking sees, start one, and list its checkpoints and datasets."""


@app.command()
def doctor(
    *,
    problems: Annotated[bool, typer.Option("--problems", help="Print only warnings and errors.")] = False,
    as_json: _Json = False,
) -> None:
    """Say what a training would find here, and what is wrong.

    Versions, variables, paths and stores. What is written to try a path is removed again. No secret is shown, so the
    report can go into a bug report. Exits with 1 where something is wrong.
    """
    from polyaxon_tracking.cli.doctor.report import examine, print_rows, summary  # as above

    _log_to_stderr()
    rows = examine()
    result = summary(rows)
    if problems:
        rows = [row for row in rows if row.advice]
    with _standard_output():
        if as_json:
            _print_json(result | {"checks": [row._asdict() for row in rows]})
        else:
            print_rows(_console(), rows)
    raise typer.Exit(0 if result["ok"] else _WRONG)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="What to run, and its arguments, after --.")],
    *,
    outputs: Annotated[
        str, typer.Option(metavar="DIR", help="Where the outputs go: a directory, or a URL.")
    ] = "outputs",
    data: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A dataset: its name in the cluster, and where it is here.")
    ] = [],  # noqa: B006  # Typer copies it
    ref: Annotated[
        list[str], typer.Option(metavar="KIND=PATH", help="Another run's outputs: experiments=PATH or jobs=PATH.")
    ] = [],  # noqa: B006
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="How loud to log, such as INFO.")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print on standard error, as lines of JSON, what is set and how the command ended."
        ),
    ] = False,
) -> None:
    """Run a command with the environment of a cluster.

    polyaxon-tracking run --data digits=data/digits -- python train.py

    Only the command writes to standard output. It gets the signals that end a training, and its exit code is that of
    this command: 128 plus the number of the signal where one ended it.
    """
    from polyaxon_tracking.cli.run import environment, supervise

    try:
        variables = environment(outputs, data, ref, log_level)
    except TrackingError as error:
        _fail_to_run(str(error), as_json=as_json)
    if as_json:
        masked = {name: mask_urls(value) for name, value in variables.items()}
        _print_to_stderr(json.dumps({"environment": masked}))
    try:
        code = supervise(command, variables)
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126  # as shells do
        start = "polyaxon-tracking run -- python"
        is_script = command[0].endswith(".py") and os.path.isfile(command[0])
        expected = (
            f". Did you mean: {start} {shlex.quote(command[0])}?" if is_script else f", such as: {start} train.py"
        )
        _fail_to_run(
            f"Received the command {command[0]!a}, which cannot be started: {error.strerror}. Expected a "
            f"program{expected}",
            code,
            as_json=as_json,
        )
    if as_json:
        _print_to_stderr(json.dumps({"exit_code": code}))
    raise typer.Exit(code)


@app.command()
def checkpoints(
    path: Annotated[
        str | None,
        typer.Argument(
            help="An outputs path, its checkpoints, or one of the directories resume, resume-2 ... in there; may be a "
            "URL. By default the outputs path of the run, or ./outputs with its version_N.",
            show_default=False,
        ),
    ] = None,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file, and say which are intact.")] = False,
    as_json: _Json = False,
) -> None:
    """List the checkpoints to resume from, the newest first.

    Exits with 1 where --verify finds one damaged.
    """
    from polyaxon_tracking.cli.checkpoints import as_dict, find, print_found
    from polyaxon_tracking.cli.rows import displayed

    _log_to_stderr()
    try:
        root, found = find(path, _console(stderr=True), verify=verify)
    except OSError as error:
        where = f"{displayed(str(error.filename))} cannot be read: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. See that this user may read it, from here.", as_json=as_json)
    except (TrackingError, ImportError) as error:
        _fail(str(error), as_json=as_json)
    with _standard_output():
        if as_json:
            _print_json({"path": root, "checkpoints": [as_dict(one) for one in found]})
        else:
            print_found(_console(), root, found)
    raise typer.Exit(_WRONG if any(one.damage for one in found) else 0)


@app.command()
def datasets(
    urls: Annotated[
        list[str] | None,
        typer.Argument(help="Only these datasets, by their URL. By default all.", show_default=False),
    ] = None,
    *,
    clear: Annotated[bool, typer.Option("--clear", help="Remove them, except those that a process uses.")] = False,
    as_json: _Json = False,
) -> None:
    """List the local copies of datasets in stores, the last used first.

    They are in $TMPDIR, or in POLYAXON_DATA_CACHE, and stay for the next start until they are removed.

    Exits with 1 where --clear leaves one that is in use.
    """
    from polyaxon_tracking.cli.datasets import as_dict, find, print_found, remove

    try:
        directory, found = find(urls or [])
        removed = remove(found) if clear else []
    except (OSError, TrackingError) as error:
        _fail(str(error), as_json=as_json)
    with _standard_output():
        if as_json:
            _print_json({"path": directory, "datasets": [as_dict(one, removed) for one in found]})
        else:
            print_found(_console(), directory, found, removed)
    raise typer.Exit(_WRONG if clear and len(removed) < len(found) else 0)


class _WithoutSecrets(logging.Formatter):
    """Log lines with secrets masked, and without tracebacks, because the report shows the errors anyway."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(f"{record.name}: {record.getMessage()}")


def _log_to_stderr() -> None:
    # Of this package also how far a long download is.
    for name, level in (("", logging.WARNING), ("polyaxon_tracking", logging.INFO)):
        handler = logging.StreamHandler()
        handler.setFormatter(_WithoutSecrets())
        handler.setLevel(level)
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("polyaxon_tracking").setLevel(logging.INFO)
    logging.getLogger("polyaxon_tracking").propagate = False


def _console(*, stderr: bool = False) -> Console:
    # With `no_color` Rich still prints bold and dim.
    colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, color_system=colors, highlight=False, markup=False, emoji=False)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Flush what the block prints, or exit with the reason why it cannot be written."""
    try:
        yield
        if sys.stdout is not None:  # closed
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more: Typer ends
        raise
    except OSError as error:
        # Python writes at its end what is left, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"Standard output cannot be written to: {error.strerror}. See where it goes.")


def _fail(message: str, code: int = _UNUSABLE, *, as_json: bool = False) -> NoReturn:
    if as_json:
        with _standard_output():
            print(json.dumps({"error": message}))
    _print_to_stderr(f"Error: {message}")
    raise typer.Exit(code)


def _fail_to_run(message: str, code: int = _UNUSABLE, *, as_json: bool) -> NoReturn:
    """Exit because the command could not be started; standard output stays empty, because it belongs to the command."""
    _print_to_stderr(json.dumps({"error": message}) if as_json else f"Error: {message}")
    raise typer.Exit(code)


def _print_to_stderr(line: str) -> None:
    """Write to standard error; if that is closed or nobody reads it, only the exit code says what happened."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            # Past the buffer, which Python would write again at its end, and exit with another code.
            os.write(sys.stderr.fileno(), f"{line}\n".encode(sys.stderr.encoding, "backslashreplace"))
