"""Kill trainings with SIGKILL while they save, and look how the next start resumes: `python benchmarks/durability.py`.

Each training runs on the outputs that the killed one left, as a restarted pod would, and is killed in turn: at a random
moment of a save, of the first save, of pruning, or of resuming. It prints a Markdown table; with `--json` what each
start found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import trainings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS = (
    "lightning",
    "lightning_foreground",
    "keras",
    "keras_foreground",
    "transformers",
    "transformers_foreground",
    "torch",
    "torch_foreground",
)
BACKGROUND = ("lightning", "keras", "transformers", "torch", "lightning_async")
NATIVES = (
    "lightning_native",
    "lightning_async",
    "keras_native",
    "keras_weights",
    "keras_backup",
    "keras_double_backup",
    "transformers_native",
    "torch_native",
    "torch_fabric",
    "torch_accelerate",
)
MOMENTS = ("saving", "first-save", "pruning", "resuming")
OTHER_FILE_SYSTEM = "/dev/shm"  # a tmpfs on every Linux
SECONDS = 120


class Training:
    """A training in a process forked from this one, so that the frameworks are imported once."""

    def __init__(self, train: Callable[[Path, trainings.Report], None], outputs: Path, *, die_pruning: bool) -> None:
        reading, writing = os.pipe()
        self.log = outputs.with_name("log")
        self.pid = os.fork()
        if not self.pid:
            try:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                if die_pruning:
                    _die_before_a_checkpoint_goes()
                train(outputs, trainings.Report(writing))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                raise
            finally:
                os._exit(1)  # it never ends by itself
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb", buffering=0)
        self._rest = b""
        self.ended = False

    def lines(self, seconds: float = SECONDS) -> Iterator[list[str]]:
        """Yield the words of each line of the report, until the process has ended or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            while b"\n" in self._rest:
                line, self._rest = self._rest.split(b"\n", 1)
                yield line.decode().split()
            left = deadline - time.monotonic()
            if self.ended or left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                return
            received = self._pipe.read(4096)
            self.ended = not received
            self._rest += received

    def kill(self) -> list[list[str]]:
        """End it at once, and return what it had reported before and was not read."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        with self._pipe:
            return list(self.lines())

    def error(self) -> str:
        return self.log.read_text().strip().rpartition("\n")[2]


def _die_before_a_checkpoint_goes() -> None:
    unlink, rename = os.unlink, os.rename

    def die(path: Any, **options: Any) -> None:
        if "step=" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, **options)

    def die_of_a_folder(path: Any, other: Any) -> None:
        if "step=" in os.path.basename(path):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(path, other)

    os.unlink = os.remove = die
    os.rename = die_of_a_folder


def trials(subject: str, moment: str, kills: int, outputs: Path, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Return what each start after a kill found, until so many kills came at the requested moment."""
    train = getattr(trainings, subject)
    promised = done = 0
    resuming, saves = 0.05, [0.05]  # seconds
    left: dict[str, int] = {}
    while True:
        training = Training(train, outputs, die_pruning=moment == "pruning")
        if moment == "resuming" and promised:
            time.sleep(chance.uniform(0, resuming))
            training.kill()
            done += 1
            training = Training(train, outputs, die_pruning=False)
        started = time.monotonic()
        began = next(training.lines(), None)
        resuming = time.monotonic() - started
        if began is None:
            training.kill()
            yield {"promised": promised, "began": None, "whole": False, "error": training.error(), **left}
        else:
            yield {"promised": promised, "began": int(began[1]), "whole": began[2] == "whole", **left}
        if done >= kills:
            if began is not None:
                training.kill()
            return
        if began is None or (moment == "first-save" and promised):
            if began is not None:
                training.kill()
            shutil.rmtree(outputs)  # after a failure, as the user would: what is left cannot be used
            promised = 0
            continue
        kill = _run_until_killed(training, moment, int(began[1]), statistics.median(saves), chance)
        promised, left = kill.promised, left_behind(outputs)
        saves += kill.seconds
        # A background write may continue long after the loop believes that all is saved.
        done += moment != "resuming" and (kill.in_time or subject in BACKGROUND)


class Kill(NamedTuple):
    promised: int
    """The last step that was saved, as far as the training knew."""
    in_time: bool
    """True if the training was saving when it was killed."""
    seconds: list[float]
    """How long its saves took."""


def _run_until_killed(training: Training, moment: str, began: int, save: float, chance: random.Random) -> Kill:
    target = 1 if moment == "first-save" else began + chance.randint(2, 4)
    reported = [["saved", str(began)]]
    times = [0.0]
    for line in training.lines():
        reported.append(line)
        times.append(time.monotonic())
        if line[0] == "saving" and int(line[1]) >= target and moment != "pruning":  # which kills itself
            time.sleep(chance.uniform(0, save))
            break
    reported += training.kill()
    # The first save of a process takes longer than the others.
    seconds = [end - start for start, end in zip(times[4::2], times[5::2], strict=False)]
    promised = max(int(line[1]) for line in reported if line[0] == "saved")
    return Kill(promised, reported[-1][0] == "saving", seconds)


def left_behind(outputs: Path) -> dict[str, int]:
    """Count the files under a final name that are whole, and those that are torn, as far as a quick look shows."""
    files = [
        path
        for suffix in ("ckpt", "keras", "pt")
        for path in outputs.rglob(f"*.{suffix}")
        if ".staging" not in str(path)
    ]
    whole = [path for path in files if zipfile.is_zipfile(path)]
    folders = [path for path in outputs.rglob("checkpoint-*") if path.is_dir() and ".staging" not in str(path)]
    # What the Trainer writes last.
    whole_folders = [path for path in folders if (path / "trainer_state.json").exists()]
    best = sum(path.name.startswith("best") for path in whole)
    torn = len(files) - len(whole) + len(folders) - len(whole_folders)
    return {"torn": torn, "best": best + len(whole_folders)}


def summary(subject: str, place: str, found: list[dict[str, Any]]) -> str:
    starts = [trial for trial in found if trial["promised"]]
    nothing = sum(trial["began"] is None for trial in starts)
    back = sum(trial["began"] is not None and trial["began"] < trial["promised"] for trial in starts)
    mixed = sum(trial["began"] is not None and not trial["whole"] for trial in starts)
    torn = sum(bool(trial.get("torn")) for trial in starts)
    description = getattr(trainings, subject).__doc__.partition("\n")[0].rstrip(".")
    framework = {"transformers": "Hugging Face", "torch": "Your own loop"}.get(
        name := subject.partition("_")[0], name.capitalize()
    )
    return f"| {framework}: {description} | {place} | {len(starts)} | {nothing} | {back} | {mixed} | {torn} |"


HEADER = """\
| | `$TMPDIR` | starts after a kill | nothing to resume from | goes back further than was saved | \
parts of two states | a torn file under its name |
|---|---|---|---|---|---|---|"""


def run(subject: str, moment: str, kills: int, seed: int, outputs: str | None) -> list[dict[str, Any]]:
    """Run the trials of one subject in this process, which imports the frameworks."""
    __import__(f"polyaxon_{subject.partition('_')[0]}")
    os.environ["POLYAXON_LOG_LEVEL"] = "WARNING"
    with tempfile.TemporaryDirectory(dir=outputs) as directory:
        if subject.startswith("keras"):  # which imports more at its first save: seconds in every training otherwise
            import keras

            keras.Sequential([keras.Input((1,))]).save(os.path.join(directory, "first.keras"))
        return list(trials(subject, moment, kills, Path(directory, "outputs"), random.Random(seed)))


def in_a_process(subject: str, moment: str, kills: int, seed: int, outputs: str | None, tmp: str | None) -> Any:
    command = [sys.executable, "-W", "ignore", __file__, "--json", "--subjects", subject, "--moment", moment]
    command += ["--kills", str(kills), "--seed", str(seed)]
    command += ["--outputs", outputs] if outputs else []
    environment = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"} | ({"TMPDIR": tmp} if tmp else {})
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=[*OURS, *NATIVES], default=[*OURS, *NATIVES])
    parser.add_argument("--moment", choices=MOMENTS, default="saving")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--outputs", help="where to make the directories of outputs; by default in $TMPDIR")
    parser.add_argument("--json", action="store_true", help="the trials of one subject")
    arguments = parser.parse_args()
    if arguments.json:
        [subject] = arguments.subjects
        print(json.dumps(run(subject, arguments.moment, arguments.kills, arguments.seed, arguments.outputs)))
        return
    print(HEADER, flush=True)
    outputs = arguments.outputs or tempfile.gettempdir()
    for subject in arguments.subjects:
        for place, tmp in (("same file system", None), ("another", OTHER_FILE_SYSTEM)):
            found = in_a_process(subject, arguments.moment, arguments.kills, arguments.seed, outputs, tmp)
            print(summary(subject, place, found), flush=True)


if __name__ == "__main__":
    main()
