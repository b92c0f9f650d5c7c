"""Train on real data, kill the training with SIGKILL, start it again, and show what happened: `make demo`.

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

from digits import LOCAL

HERE = Path(__file__).parent
ROOT = Path("demo-outputs").absolute()


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    data = ROOT / "data" / "digits"
    data.mkdir(parents=True)
    shutil.copy(Path(LOCAL, "digits.csv.gz"), data)
    for name, script in (("PyTorch Lightning", "lightning_digits.py"), ("Keras", "keras_digits.py")):
        interrupted_training(name, script, data)


def interrupted_training(name: str, script: str, data: Path) -> None:
    outputs = ROOT / "user" / "digits" / "experiments" / script.partition("_")[0]
    environment = os.environ | {
        "POLYAXON_RUN_OUTPUTS_PATH": str(outputs),
        "POLYAXON_RUN_DATA_PATHS": json.dumps({"digits": str(data)}),
        "POLYAXON_LOG_LEVEL": "INFO",
        "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "torch"),
        "PYTHONUNBUFFERED": "1",
    }
    say(f"{name}: examples/{script}")
    log = outputs.parent / f"{outputs.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as file:
        training = start(script, environment, file)
        wait_for_epochs(training, outputs, 4)
        training.send_signal(signal.SIGKILL)  # no handler runs, nothing is flushed: as when a machine is taken away
        training.wait()
    print(f"  started, and killed with SIGKILL after {time.monotonic() - started:.0f} s")
    kept = sorted(path.name for path in (outputs / "checkpoints" / "resume").glob("step=*"))
    print(f"  kept for resuming: {', '.join(kept)}")

    with log.open("a") as file:
        start(script, environment, file).wait()
    lines = log.read_text().splitlines()
    resumed = next((line for line in lines if "Resuming from" in line), None)
    result = next((line for line in lines if line.startswith("test accuracy")), None)
    if resumed is None or result is None:
        sys.exit(f"The second start did not resume and finish. Its log is {log}")
    print("  started again:", resumed.removeprefix("polyaxon_tracking: ").replace(f"{outputs}{os.sep}", ""))
    print("  finished:", re.sub(r", best model.*", "", result))
    print(f"  outputs: {outputs.relative_to(Path.cwd())}")
    for path in sorted(path for path in outputs.rglob("*") if path.is_file()):
        print(f"    {path.relative_to(outputs)}  ({path.stat().st_size / 1e6:.1f} MB)")


def start(script: str, environment: dict[str, str], log: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / script)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)  # type: ignore[call-overload]


def wait_for_epochs(training: subprocess.Popen[bytes], outputs: Path, epochs: int) -> None:
    while training.poll() is None:
        saved = [re.search(r"epoch=(\d+)", path.name) for path in (outputs / "checkpoints" / "resume").glob("step=*")]
        if any(match and int(match[1]) >= epochs for match in saved):
            return
        time.sleep(0.01)
    sys.exit(f"The training ended before it could be killed. Its log is {ROOT}")


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
