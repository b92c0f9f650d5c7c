"""The command ``polyaxon-tracking``. It alone needs Typer and Rich, which the extra ``cli`` installs."""

import sys

__all__ = ["main"]

_EXTRA_MISSING = 3


def main() -> None:
    """Run the command, or say which extra it needs."""
    try:
        from polyaxon_tracking.cli.app import app  # here and not above: without the extra it cannot be imported
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "polyaxon_tracking":
            raise
        print(
            f"The command polyaxon-tracking needs packages that are not installed: {error}. Install them with: "
            f'pip install "polyaxon-tracking[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(_EXTRA_MISSING) from None
    app(prog_name="polyaxon-tracking")
