"""``polyaxon-tracking doctor``: examine what a run is given."""
