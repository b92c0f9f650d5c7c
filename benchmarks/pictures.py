"""Draw the pictures of the documentation, from what was measured: `python benchmarks/pictures.py`.

    docs/pictures/blocked.svg        from the table of states in docs/background.md (`make bench`)
    docs/pictures/kills.svg          from the tables of docs/durability.md and docs/transformers.md
    docs/pictures/interruption.svg   from docs/pictures/interruption.json: with `--train`, trainings that are made now
    docs/pictures/layout.svg         what is written where

The same figures give the same bytes. Ink has the colour of the page's text, in light and in dark.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
EXAMPLE = ROOT / "examples" / "lightning_digits.py"

# Stands for the colour of the page's text; of no other use.
INK = "#010203"
OURS, NATIVE, OTHER, FAINT = "#2f81c7", "#d9752c", "#8b6fc0", "#8c929b"
STYLE = """\
<style>
svg { color: #1f2328; }
@media (prefers-color-scheme: dark) { svg { color: #e6e8eb; } }
</style>
"""
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polyaxon-tracking",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train again for the loss curve")
    if parser.parse_args().train:
        (PICTURES / "interruption.json").write_text(json.dumps(interrupted_training()) + "\n")
    for name, draw in DRAWINGS.items():
        (PICTURES / name).write_text(svg(draw))


def svg(draw: Callable[[], Figure]) -> str:
    """Return the picture, with ink that takes the colour of the page's text."""
    with mpl.rc_context(SETTINGS):
        figure = draw()
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    text = target.getvalue().replace(INK, "currentColor")
    text = re.sub(r"(<svg [^>]*>\n)", lambda match: match[1] + STYLE, text, count=1)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


# Tables


def table(page: str, header: str) -> list[list[str]]:
    """Return the cells of the table of `page` whose first line begins with `header`."""
    _, _, rest = (DOCS / page).read_text().partition(f"\n{header}")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# How long training is held up


def blocked() -> Figure:
    states = table("background.md", "| state | Lightning |")
    megabytes = [float(row[0].removesuffix(" MB")) for row in states]
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True, layout="constrained")
    ours, copy = "PolyaxonCallback", "a copy of the state in memory"
    curves = [
        [
            (2, "ModelCheckpoint(save_last=True)", NATIVE, "-"),
            (3, "the same with AsyncCheckpointIO", OTHER, "-"),
            (1, ours, OURS, "-"),
            (7, copy, FAINT, ":"),
        ],
        [
            (5, "ModelCheckpoint, a full .keras", NATIVE, "-"),
            (6, "OrbaxCheckpoint", OTHER, "-"),
            (4, ours, OURS, "-"),
            (7, copy, FAINT, ":"),
        ],
    ]
    for axes, title, drawn in zip(panels, ("PyTorch Lightning", "Keras on torch"), curves, strict=True):
        for column, label, colour, line in drawn:
            seconds = [float(row[column].removesuffix(" ms")) / 1000 for row in states]
            axes.plot(megabytes, seconds, line, marker="o", markersize=4, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="state")
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(labelcolor="linecolor", fontsize=9)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g} GB" if value >= 1000 else f"{value:g} MB")
        )
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms")
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(megabytes)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    panels[0].set_ylabel("one checkpoint event: training waits")
    return figure


# Kills


class Outcome(NamedTuple):
    """The results of the starts after a kill."""

    starts: int
    nothing: int
    further_back: int
    mixed: int


def kills() -> Figure:
    groups = [
        ("Lightning, PolyaxonCallback", "durability.md", "Lightning: PolyaxonCallback"),
        ("ModelCheckpoint(save_last=True)", "durability.md", "Lightning: ModelCheckpoint"),
        ("AsyncCheckpointIO", "durability.md", "Lightning: AsyncCheckpointIO"),
        ("Keras, PolyaxonCallback", "durability.md", "Keras: PolyaxonCallback"),
        ("ModelCheckpoint(save_best_only=True)", "durability.md", "Keras: ModelCheckpoint(save_best_only"),
        ("ModelCheckpoint(save_weights_only=True)", "durability.md", "Keras: ModelCheckpoint(save_weights_only"),
        ("BackupAndRestore", "durability.md", "Keras: BackupAndRestore |"),
        ("BackupAndRestore(double_checkpoint=True)", "durability.md", "Keras: BackupAndRestore(double"),
        ("Hugging Face, PolyaxonCallback", "transformers.md", "`PolyaxonCallback"),
        ("resume_from_checkpoint=True", "transformers.md", "`save_total_limit"),
    ]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for row, (label, page, beginning) in enumerate(groups):
        found = outcome(page, beginning)
        came_back = found.starts - found.nothing - found.further_back - found.mixed
        parts = [
            (came_back, OURS if "Polyaxon" in label else FAINT),
            (found.further_back + found.mixed, OTHER),
            (found.nothing, NATIVE),
        ]
        left = 0.0
        for count, colour in parts:
            axes.barh(row, count / found.starts, left=left, height=0.62, color=colour)
            left += count / found.starts
        axes.text(1.015, row, f"{came_back} of {found.starts}", va="center")
        axes.text(-0.015, row, label, va="center", ha="right", weight="bold" if "Polyaxon" in label else "normal")
    axes.invert_yaxis()
    axes.set_axis_off()
    for x, text, colour in (
        (0.0, "resumed from what was saved", OURS),
        (0.47, "from further back", OTHER),
        (0.79, "nothing to resume from", NATIVE),
    ):
        axes.text(x, -1.0, text, color=colour, va="center")
    return figure


def outcome(page: str, beginning: str) -> Outcome:
    """Both places of `$TMPDIR` and both modes together."""
    rows = table(page, "| | `$TMPDIR` |")
    found = [row for row in rows if (f"{row[0]} |").startswith(beginning)]
    if not found:
        raise LookupError(f"{page} has no row that begins with {beginning!r}")
    starts, nothing, back = (sum(int(row[column]) for row in found) for column in (2, 3, 4))
    mixed = sum(int(row[5]) for row in found) if len(found[0]) > 6 else 0
    return Outcome(starts, nothing, back, mixed)


# A loss curve across an interruption

Curve = list[tuple[int, float]]


def interrupted_training() -> dict[str, Curve]:
    """Return the losses of a training that was killed, of its resumption, and of an uninterrupted one."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = Path(directory, "killed")
        last(outputs)  # which imports what reads the events, and that takes as long as the training
        training = start(outputs)
        # In the second half of an epoch, some way into the training.
        while training.poll() is None and (saved_step(outputs) < 150 or last(outputs) < saved_step(outputs) + 20):
            time.sleep(0.001)
        training.send_signal(signal.SIGKILL)
        if training.wait() != -signal.SIGKILL:
            sys.exit("The training ended before it could be killed.")
        killed, step = losses(outputs), saved_step(outputs)
        before = {path.name for path in outputs.glob("tensorboard/events*")}
        if start(outputs).wait():
            sys.exit("The training that resumed did not end well.")
        resumed = losses(outputs, without=before)
        uninterrupted = Path(directory, "uninterrupted")
        if start(uninterrupted).wait():
            sys.exit("The training that nothing interrupted did not end well.")
        return {"saved": [(step, 0.0)], "killed": killed, "resumed": resumed, "uninterrupted": losses(uninterrupted)}


def saved_step(outputs: Path) -> int:
    """Return the step of the newest state to resume from."""
    return max((int(path.name[5:15]) for path in outputs.glob("checkpoints/resume/step=*")), default=0)


def last(outputs: Path) -> int:
    """Return the last step whose loss was written."""
    return max((step for step, _ in losses(outputs)), default=0)


def start(outputs: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), "POLYAXON_LOG_LEVEL": "INFO"}
    return subprocess.Popen([sys.executable, str(EXAMPLE)], env=environment, stdout=subprocess.DEVNULL)


def losses(outputs: Path, without: set[str] | None = None) -> Curve:
    """Return steps and training losses in the event files of TensorBoard, in the order they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Curve = []
    for path in sorted(outputs.glob("tensorboard/events*")):
        if path.name not in (without or ()):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            if "train_loss" in events.Tags()["scalars"]:
                found += [(event.step, round(event.value, 4)) for event in events.Scalars("train_loss")]
    return found


def interruption() -> Figure:
    curves: dict[str, Curve] = json.loads((PICTURES / "interruption.json").read_text())
    [(saved, _)] = curves["saved"]
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    plot(axes, curves["uninterrupted"], color=FAINT, linewidth=5, alpha=0.45)
    plot(axes, curves["killed"], color=NATIVE, linewidth=1.6)
    plot(axes, curves["resumed"], color=OURS, linewidth=1.6)
    end, loss = curves["killed"][-1]
    axes.plot([end], [loss], marker="x", markersize=9, markeredgewidth=2, color=NATIVE)
    axes.axvline(saved, ymax=0.5, color=INK, linewidth=0.8, linestyle=":")
    lines = [
        (f"killed after step {end}", NATIVE),
        (f"resumes from step {saved}, the last that was saved,", OURS),
        ("and comes to the same losses again", OURS),
        ("wide: a training that nothing interrupted", FAINT),
    ]
    for row, (text, colour) in enumerate(lines):
        axes.text(0.99, 0.95 - 0.09 * row, text, color=colour, ha="right", va="center", transform=axes.transAxes)
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    return figure


def plot(axes: Axes, curve: Curve, **options: object) -> None:
    axes.plot(*zip(*curve, strict=True), **options)


# What is written where


def layout() -> Figure:
    figure, axes = plt.subplots(figsize=(10.6, 4.6))
    axes.set(xlim=(0, 100), ylim=(0, 56))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle="round,pad=0.4", facecolor="none", edgecolor=colour, linewidth=1.2
            )
        )

    def arrow(begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2))

    def say(x: float, y: float, text: str, colour: str = INK, **options: object) -> None:
        axes.text(x, y, text, color=colour, va="center", **options)

    box(1, 36, 27, 17, INK)
    say(3, 50.5, "your training script", weight="bold")
    say(3, 46, "its framework's Trainer or fit")
    say(3, 42, "PolyaxonCallback", OURS, weight="bold")
    say(3, 38.2, "copies the state in memory", OURS)
    arrow((13, 35.2), (13, 28.4), OURS)
    box(1, 12, 27, 15.5, OURS)
    say(3, 25, "one thread", OURS, weight="bold")
    say(3, 21, "writes, syncs, checks,")
    say(3, 17.6, "renames, or uploads whole;")
    say(3, 14.2, "then removes the oldest")
    box(39, 1, 60, 52, INK)
    arrow((28.8, 20), (38.2, 20), OURS)
    say(30, 22.2, "complete", OURS, fontsize=8)
    say(30, 17.8, "or absent", OURS, fontsize=8)
    mono = {"family": "monospace", "fontsize": 9}
    say(41, 50.5, "<outputs>/", **mono)
    say(98, 50.5, "the run's outputs path, on a disk or in a bucket", FAINT, fontsize=8, ha="right")
    say(43, 46, "checkpoints/", **mono)
    say(46, 41.5, "epoch=19-step=860.ckpt", NATIVE, **mono)
    say(46, 38, "best.keras", NATIVE, **mono)
    say(46, 34.5, "bert/checkpoint-500/", NATIVE, **mono)
    say(73, 38, "yours: what your\nown callbacks ask for", NATIVE, fontsize=8)
    say(46, 29.5, "resume/", OURS, **mono)
    say(49, 25.5, "step=0000000817-epoch=19-start=1-crc=1f6eedad.ckpt", OURS, **mono)
    say(49, 22, "step=0000000860-epoch=20-start=1-crc=c6d988db.ckpt", OURS, **mono)
    say(49, 18.5, "whole training states, the newest two: the next start resumes here", OURS, fontsize=8)
    say(49, 14.2, ".staging-…/", FAINT, **mono)
    say(63, 14.2, "a write under way; swept after a kill", FAINT, fontsize=8)
    say(46, 10, "resume-2/", OURS, **mono)
    say(63, 10, "of the second training in the same script", FAINT, fontsize=8)
    say(43, 5, "tensorboard/, metrics.json, …", **mono)
    say(76, 5, "what else you write", FAINT, fontsize=8)
    return figure


DRAWINGS = {"blocked.svg": blocked, "kills.svg": kills, "interruption.svg": interruption, "layout.svg": layout}


if __name__ == "__main__":
    main()
