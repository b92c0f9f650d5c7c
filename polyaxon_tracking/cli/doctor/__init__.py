"""``polyaxon-tracking doctor``: check a run's versions, variables and paths."""
