"""TensorBoard, in a browser, on the outputs of a training that was killed and resumed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import numpy as np
import pytest
from matplotlib.image import imread
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_digits.py"
EPOCHS, STEPS_PER_EPOCH = 20, 43


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs of a training that was killed half-way, and started again."""
    outputs = tmp_path_factory.mktemp("outputs")
    environment = {"POLYAXON_RUN_OUTPUTS_PATH": str(outputs), "POLYAXON_LOG_LEVEL": "INFO"}
    training = forked.start("lightning", EXAMPLE, **environment)
    while not any(outputs.glob("checkpoints/resume/*epoch=1?-*")) and training.poll() is None:
        time.sleep(0.01)
    training.send_signal(signal.SIGKILL)
    _, stderr = training.communicate()
    assert training.returncode == -signal.SIGKILL, stderr
    resumed = forked.run("lightning", EXAMPLE, **environment)
    assert re.search(r"Resuming from \S+: epoch 1\d, step \d+\n", resumed.stderr)
    return outputs


@pytest.fixture(scope="module")
def tensorboard(outputs: Path) -> Iterator[str]:
    """Serve the outputs with TensorBoard, and yield its URL."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0", "--logdir", str(outputs)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        yield next(found[0] for line in server.stderr if (found := re.search(r"http://127.0.0.1:\d+/", line)))
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture
def page() -> Iterator[Page]:
    unpacked = Path(sys.prefix) / "chromium" / "usr"
    installed = shutil.which("chromium")
    if unpacked.exists():
        [libraries] = (unpacked / "lib").glob("*-linux-gnu")
        environment = os.environ | {"LD_LIBRARY_PATH": f"{libraries}:{libraries}/pulseaudio"}
        path = str(unpacked / "lib" / "chromium" / "chromium")
    else:
        assert installed, "This needs chromium: `make test` fetches Debian's; on other systems install it."
        environment, path = dict(os.environ), installed
    # What draws the curves where there is no GPU.
    options = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        with contextlib.closing(playwright.chromium.launch(executable_path=path, args=options, env=environment)) as it:
            yield it.new_page(viewport={"width": 1200, "height": 900})


def scalars(tensorboard: str, tag: str) -> list[tuple[int, float]]:
    """Return steps and values, as TensorBoard gives them to the browser."""
    query = urllib.parse.urlencode({"run": "tensorboard", "tag": tag})
    with urllib.request.urlopen(f"{tensorboard}data/plugin/scalars/scalars?{query}") as response:
        return [(step, value) for _, step, value in json.load(response)]


def test_each_step_has_one_value(tensorboard: str) -> None:
    """The steps after the last checkpoint are trained again, with the same values."""
    found = scalars(tensorboard, "val_loss")
    assert sorted(set(found)) == sorted(dict(found).items())
    assert sorted(dict(found)) == [STEPS_PER_EPOCH * epoch - 1 for epoch in range(1, EPOCHS + 1)]
    found = scalars(tensorboard, "train_loss")
    assert sorted(set(found)) == sorted(dict(found).items())
    assert sorted(dict(found)) == list(range(9, STEPS_PER_EPOCH * EPOCHS, 10))


@pytest.mark.parametrize("tag", ["val_loss", "train_loss"])
def test_the_browser_shows_one_curve_without_a_gap(tensorboard: str, page: Page, tag: str) -> None:
    errors: list[Any] = []
    page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108  # it sets an attribute of what it gets
    page.goto(f"{tensorboard}?tagFilter=%5E{tag}%24&smoothing=0#timeseries")
    card = page.locator("scalar-card")
    card.locator("line-chart").wait_for()
    assert card.locator(".tag").get_attribute("title") == tag
    shown = card.locator("tb-data-table-content-row")  # a run, and its last step
    assert re.search(rf"\btensorboard\b.*\b{EPOCHS * STEPS_PER_EPOCH - 1}\b", shown.inner_text(), re.DOTALL)
    deadline = time.monotonic() + 60
    while not (curve := curve_in(card.locator("line-chart .series-view").screenshot())).any():
        assert time.monotonic() < deadline, "nothing was drawn"
        page.wait_for_timeout(500)
    columns = np.flatnonzero(curve.any(axis=0))
    assert columns[-1] - columns[0] > 0.7 * curve.shape[1]  # all epochs, and some space on both sides
    assert (np.diff(columns) == 1).all()
    tops, bottoms = curve.argmax(axis=0)[columns], curve.shape[0] - 1 - curve[::-1].argmax(axis=0)[columns]
    # Each column of pixels touches the next.
    assert (tops[1:] <= bottoms[:-1] + 1).all()
    assert (bottoms[1:] >= tops[:-1] - 1).all()
    assert not errors


def curve_in(screenshot: bytes) -> Any:
    """Return which pixels have a curve's colour: axes, grid and text are grey."""
    pixels = imread(io.BytesIO(screenshot))[..., :3]
    return pixels.max(axis=-1) - pixels.min(axis=-1) > 0.06
