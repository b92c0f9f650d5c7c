"""The command ``polyaxon-tracking``. Only this command needs Typer and Rich, which the extra ``cli`` installs."""

import sys

__all__ = ["main"]

_EXTRA_MISSING = 3


def main() -> None:
    """Run the command, or print which extra to install."""
    try:
        from polyaxon_tracking.cli.app import app  # here and not above: the import fails without the extra
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
