"""Which tests the installed Lightning allows."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

collect_ignore: list[str] = []
if Version(metadata.version("lightning")) < Version("2.4"):  # has no ModelParallelStrategy
    collect_ignore += ["sharded_script.py", "test_sharded.py"]
