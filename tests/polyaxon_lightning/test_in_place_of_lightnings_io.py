"""A ModelCheckpoint does the same with this package's CheckpointIO as with Lightning's own."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from polyaxon_lightning import PolyaxonCallback

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS: list[dict[str, Any]] = [
    {},
    {"save_top_k": 2, "monitor": "rises", "mode": "max"},
    {"save_top_k": 2, "monitor": "rises", "mode": "min"},
    {"save_top_k": -1, "monitor": "rises", "filename": "{epoch:02d}-{rises:.1f}"},
    {"save_top_k": 0},
    {"save_last": True},
    {"save_last": "link", "monitor": "rises"},
    {"save_last": True, "save_top_k": 2, "monitor": "rises", "mode": "max", "filename": "best"},
    {"every_n_epochs": 2, "save_top_k": -1},
    {"every_n_train_steps": 3, "save_top_k": -1},
    {"train_time_interval": timedelta(microseconds=1), "save_top_k": 3, "monitor": "step", "mode": "max"},
    {"save_on_train_epoch_end": True, "monitor": "rises", "save_top_k": 1, "mode": "max"},
    {"save_weights_only": True},
    {"enable_version_counter": False, "filename": "same"},
    {"auto_insert_metric_name": False, "filename": "{epoch}/{step}", "save_top_k": -1},
]


class Model(BoringModel):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("rises", float(self.current_epoch))


def fit(directory: Path, options: dict[str, Any], *callbacks: Any, epochs: int = 3, **settings: Any) -> dict[str, Any]:
    """Return the files that a fit leaves below `directory`, and the attributes of its ModelCheckpoint."""
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(directory, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, *callbacks],
        **settings,
    )
    trainer.fit(Model())

    def below(value: Any) -> Any:
        return str(value).replace(str(directory), "")

    files = {
        below(path): sorted(torch.load(path, weights_only=False)["state_dict"])
        for path in directory.glob("**/*.ckpt")
        if "resume" not in path.parts
    }
    if options.get("save_weights_only"):
        for path in directory.glob("**/*.ckpt"):
            assert "optimizer_states" not in torch.load(path, weights_only=False)
    return {
        "files": files,
        "best": below(checkpoint.best_model_path),
        "best score": checkpoint.best_model_score,
        "last": below(checkpoint.last_model_path),
        "kept": {below(path): float(score) for path, score in checkpoint.best_k_models.items()},
        "worst kept": below(checkpoint.kth_best_model_path),
    }


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_files_under_the_same_names(options: dict[str, Any], background: bool, tmp_path: Path) -> None:
    natively = tmp_path / "natively"
    callback = PolyaxonCallback(background=background)
    for _ in range(2):  # the names are taken the second time
        expected = fit(natively, options)
        assert fit(tmp_path / "ours", options, callback) == expected


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_what_is_saved_is_what_was_there_when_it_was_saved(background: bool, tmp_path: Path) -> None:
    """Lightning's own asynchronous IO saved what training had made of it meanwhile."""
    options = {"save_top_k": -1, "every_n_train_steps": 1}
    fit(tmp_path / "natively", options)
    fit(tmp_path / "ours", options, PolyaxonCallback(background=background))
    names = sorted(path.name for path in (tmp_path / "natively").iterdir())
    assert len(names) == 3 * 4
    for name in names:
        one, other = (torch.load(tmp_path / io / name)["state_dict"] for io in ("natively", "ours"))
        assert all(torch.equal(one[key], other[key]) for key in one)


class _OfTheUser(TorchCheckpointIO):
    pass


# Not an asynchronous one around another: that of Lightning 2.2 loses files at the end by itself.
@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, _OfTheUser])
def test_the_users_checkpoint_io_is_kept(plugin: Any, tmp_path: Path) -> None:
    # All are kept: Lightning's AsyncCheckpointIO may remove a checkpoint before it has written it, which stays then.
    options = {"save_top_k": -1, "monitor": "step", "mode": "max"}
    expected = fit(tmp_path / "natively", options, plugins=[plugin()])
    io = plugin()
    assert fit(tmp_path / "ours", options, PolyaxonCallback(), plugins=[io]) == expected
    assert type(io) is plugin
