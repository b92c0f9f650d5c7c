"""Run the command ``polyaxon-tracking`` as ``python -m polyaxon_tracking``."""

from polyaxon_tracking.cli import main

if __name__ == "__main__":
    main()
