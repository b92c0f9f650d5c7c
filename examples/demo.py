"""Train on real data, kill the training with SIGKILL, start it again, and show each thing that happens: `make demo`.

The cluster's variables point to directories below ``demo-outputs``; the scripts are those that a cluster would run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from digits import LOCAL

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ROOT = Path("demo-outputs").absolute()
SECONDS_BETWEEN_LINES = 3


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    shutil.rmtree(ROOT, ignore_errors=True)
    data = ROOT / "data" / "digits"
    data.mkdir(parents=True)
    shutil.copy(Path(LOCAL, "digits.csv.gz"), data)
    for name, script in (("PyTorch Lightning", "lightning_digits.py"), ("Keras", "keras_digits.py")):
        interrupt_and_resume(name, script, data)


def interrupt_and_resume(name: str, script: str, data: Path) -> None:
    outputs = ROOT / "user" / "digits" / "experiments" / script.partition("_")[0]
    outputs.mkdir(parents=True)
    environment = os.environ | {
        "POLYAXON_RUN_OUTPUTS_PATH": str(outputs),
        "POLYAXON_RUN_DATA_PATHS": json.dumps({"digits": str(data)}),
        "POLYAXON_LOG_LEVEL": "INFO",
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",  # the models are small: several threads would mostly wait for each other
        "PYTHONUNBUFFERED": "1",
    }
    title = f"{name}: examples/{script}"
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}")
    print(f"  started: importing {name}")
    train(script, environment, outputs, kill_after_epoch=4)
    print("  killed with SIGKILL")
    kept = sorted(path.name for path in training_states(outputs))
    print(f"  kept for resuming: {', '.join(kept)}")
    print(f"  started again: importing {name}")
    train(script, environment, outputs)
    print(f"  outputs: {outputs.relative_to(Path.cwd())}")
    for path in sorted(path for path in outputs.rglob("*") if path.is_file()):
        print(f"    {path.relative_to(outputs)}  ({path.stat().st_size / 1e6:.1f} MB)")


def train(script: str, environment: dict[str, str], outputs: Path, kill_after_epoch: int | None = None) -> None:
    """Run `script`, and print what it does. Kill it once the training state of epoch `kill_after_epoch` is on disk."""
    log = outputs.with_suffix(".log")
    with log.open("a") as written, log.open() as read:
        read.seek(0, os.SEEK_END)
        command = [sys.executable, str(HERE / script)]
        training = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
        for event in events(training, read, outputs):
            print(f"  {event}")
            if event == f"epoch {kill_after_epoch} is saved":
                training.send_signal(signal.SIGKILL)  # no handler runs, as when a machine is taken away
    lines = log.read_text().splitlines()
    if training.returncode != (-signal.SIGKILL if kill_after_epoch else 0):
        sys.exit(f"The training ended with {training.returncode}: {lines[-1] if lines else ''}. Its log is {log}")
    if not kill_after_epoch and not any("Resuming from" in line for line in lines):
        sys.exit(f"The second start did not resume. Its log is {log}")


def events(training: subprocess.Popen[bytes], log: TextIO, outputs: Path) -> Iterator[str]:
    """Yield what the training does, while it does it, until it ends. When nothing happens, yield how long it runs."""
    started = last = time.monotonic()
    epoch = newest_epoch(outputs)
    running = True
    while running:
        running = training.poll() is None  # first, so that nothing happens after the last look
        lines = [line.strip().replace(f"{outputs}{os.sep}", "") for line in log]
        saved = range(epoch + 1, newest_epoch(outputs) + 1)
        happened = [
            *(line.removeprefix("polyaxon_tracking: ") for line in lines if line.startswith("polyaxon_tracking: ")),
            *(f"epoch {epoch} is saved" for epoch in saved),
            *(f"finished: {line.partition(',')[0]}" for line in lines if line.startswith("test accuracy")),
        ]
        now = time.monotonic()
        if not happened and now - last >= SECONDS_BETWEEN_LINES:
            happened = [f"... {now - started:.0f} s"]
        if happened:
            last = now
        yield from happened
        epoch += len(saved)
        time.sleep(0.02)


def newest_epoch(outputs: Path) -> int:
    return max((int(re.findall(r"epoch=(\d+)", path.name)[0]) for path in training_states(outputs)), default=0)


def training_states(outputs: Path) -> list[Path]:
    return list((outputs / "checkpoints" / "resume").glob("step=*"))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # such as a disk without room
        sys.exit(f"The demo could not write to {ROOT}: {error}")
