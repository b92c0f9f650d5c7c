"""How users write it; checked by mypy and by pyright, both strict, and never run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from signal import Signals

from typing_extensions import assert_type

from polyaxon_tracking import (
    Checkpoint,
    CheckpointManager,
    PreemptionHandler,
    StepLoop,
    TrackingError,
    atomic_write,
    cached_path,
    get_data_path,
    get_data_paths,
    get_log_level,
    get_outputs_path,
    get_outputs_refs_paths,
)
from polyaxon_tracking.training import (
    BackgroundWriter,
    Directory,
    Flags,
    ProcessGroup,
    Run,
    available_memory,
    open_directory,
)

# The getters.
assert_type(get_outputs_path(), str | None)
assert_type(get_outputs_path("checkpoints", "best.pt"), str | None)
assert_type(get_data_paths(), dict[str, str] | None)
assert_type(get_data_path("digits"), str)
assert_type(get_data_path("digits", default="data/digits"), str)
assert_type(get_data_path("digits", default=Path("data")), str | Path)
assert_type(get_outputs_refs_paths(), dict[str, list[str]] | None)
assert_type(get_log_level(), str | int | None)

# The user's own loop.
checkpoints = CheckpointManager(Path("checkpoints"), max_to_keep=3)
with checkpoints.save(100, epoch=2, suffix=".pt") as path:
    assert_type(path, str)
latest = checkpoints.latest()
assert_type(latest, Checkpoint | None)
if latest is not None:
    assert_type((latest.path, latest.step, latest.epoch), tuple[str, int, int])
    assert_type(latest.verify(lambda read: read + 1), str | None)
assert_type(checkpoints.checkpoints(), list[Checkpoint])
assert_type(next(checkpoints.iter_intact()), Checkpoint)
with atomic_write("model.txt") as staged:
    Path(staged).write_text("weights", encoding="utf-8")
with StepLoop(print, print, suffix=".npz", every_n_train_steps=10) as training:
    for step in training.steps(100):
        assert_type(step, int)
assert_type((training.step, training.outputs_path, training.data_path("digits")), tuple[int, str, str])
with PreemptionHandler() as preemption:
    if preemption.requested is not None:
        assert_type(preemption.requested, Signals)
        preemption.exit()

# Stores.
assert_type(cached_path("s3://bucket/model.keras"), str)
directory = open_directory("s3://bucket/outputs")
assert_type(directory, Directory)
assert_type(directory.names(), list[str])

# The user's own integration.
run = Run(datasets=["digits"], loggers=["mine"], resume=True)
assert_type(run.checkpoint_manager(run), CheckpointManager)
assert_type((run.outputs_path, run.on_cluster, run.should_resume), tuple[str, bool, bool])
writer = BackgroundWriter(timedelta(minutes=5))
writer.submit("model.txt", lambda: Path("model.txt").write_text("weights", encoding="utf-8"))
writer.wait()
assert_type(available_memory(), int)
group = ProcessGroup()
assert_type(group.gather("value"), list[str])
assert_type(group.reduce_flags(Flags(signal=15)), Flags)
assert_type(group.latest(checkpoints), Checkpoint | None)

error: ValueError = TrackingError("message")
