"""``python -m polyaxon_tracking`` is the command ``polyaxon-tracking``."""

from polyaxon_tracking.cli import main

if __name__ == "__main__":
    main()
