"""Which tests the installed Keras allows."""

from __future__ import annotations

from importlib import metadata

collect_ignore: list[str] = []
if "model_checkpoint_test.py" not in {file.name for file in metadata.files("keras") or ()}:  # Keras shipped no tests
    collect_ignore += ["test_in_place_of_model_checkpoint.py"]
