"""The run, as the integrations see it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mounts import without_a_server

from polyaxon_tracking import TrackingError
from polyaxon_tracking.training import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = "POLYAXON_RUN_DATA_PATHS"


def message(**arguments: object) -> str:
    with pytest.raises(TrackingError) as error:
        Run(**arguments)  # type: ignore[arg-type]
    assert error.value.__cause__ is None  # the message says it all
    return str(error.value)


# Outputs


def test_off_the_cluster_outputs_go_to_the_working_directory_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    assert not run.on_cluster
    assert run.outputs_path == str(tmp_path / "outputs" / "version_0")
    assert run.checkpoints_path == str(tmp_path / "outputs" / "version_0" / "checkpoints")
    assert caplog.messages == [f"POLYAXON_RUN_OUTPUTS_PATH is not set: outputs go to {tmp_path}/outputs/version_0"]
    assert caplog.records[0].levelno == logging.INFO


def test_on_the_cluster_outputs_go_where_the_run_says(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    assert run.on_cluster
    assert run.outputs_path == str(outputs)
    assert outputs.is_dir()
    assert list(outputs.iterdir()) == []
    assert not caplog.messages


@pytest.mark.parametrize("value", ["a/outputs", "file://{tmp_path}/a/outputs", "{tmp_path}/b/../a/outputs/"])
def test_the_outputs_path_becomes_an_absolute_local_one(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", value.format(tmp_path=tmp_path))
    assert Run().outputs_path == str(tmp_path / "a" / "outputs")
    assert not (tmp_path / "file:").exists()


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_an_outputs_path_that_is(below: bool, outputs: Path) -> None:
    file = outputs.parent if below else outputs
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert message() == (
        f"Received the outputs path '{outputs}', which cannot be written to: '{file}' is a file. Expected a directory that "
        f"this user may write to. Move it away, or set POLYAXON_RUN_OUTPUTS_PATH to another path."
    )


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as a user whom permissions stop, because root may write anywhere."""
    if os.geteuid():
        yield
        return
    codecs.lookup("ascii")  # it is imported at its first use, from where this user may not read
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_outputs_path_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o555)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(directory))
    try:
        with unprivileged():
            text = message()
    finally:
        shutil.rmtree(directory)
    assert text == (
        f"Received the outputs path '{directory}', which cannot be written to: Permission denied. Expected a directory that "
        f"this user may write to. Mount the volume for writing, or set POLYAXON_RUN_OUTPUTS_PATH to another path."
    )


@pytest.mark.parametrize("below", [False, True], ids=["the mount", "below the mount"])
def test_an_outputs_path_on_a_mount_whose_server_is_gone(below: bool, outputs: Path) -> None:
    mount = outputs.parent if below else outputs
    mount.mkdir(parents=True)
    with without_a_server(mount):
        assert message() == (
            f"Received the outputs path '{outputs}', which cannot be written to: Transport endpoint is not connected. Expected a "
            f"directory that this user may write to. Mount the volume again, because its server does not respond, or set "
            f"POLYAXON_RUN_OUTPUTS_PATH to another path."
        )


def test_an_outputs_path_that_takes_only_small_files(outputs: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        told = message()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told == (
        f"Received the outputs path '{outputs}', which cannot be written to: File too large. Expected a directory that this user "
        f"may write to. Make room there, or raise the limit, or set POLYAXON_RUN_OUTPUTS_PATH to another path."
    )
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "problem", "advice"),
    [
        ("replace", "in which a file cannot replace another", "Mount a file system that can do this"),
        ("fsync", "whose files cannot be flushed to the disk", "Mount a file system that can do this"),
        (
            "lseek",
            "in which a file cannot be changed while it is being written",
            "Mount the volume with a cache for writing, such as rclone's --vfs-cache-mode writes",
        ),
    ],
)
def test_an_outputs_path_that_lacks_what_a_save_needs(
    call: str, problem: str, advice: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on mounts of buckets; no such file system can be made here, so one call of the system fails."""

    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, call, fail)
    assert message(writes_in_place=True) == (
        f"Received the outputs path '{outputs}', {problem}: Operation not supported. Expected a directory that this user may "
        f"write to. {advice}, or set POLYAXON_RUN_OUTPUTS_PATH to another path."
    )
    assert list(outputs.iterdir()) == []
    if call == "lseek":
        assert Run().outputs_path == str(outputs)  # torch writes from the beginning to the end


def test_no_op_is_off_the_cluster_and_the_line_says_so(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POLYAXON_NO_OP", "true")
    assert Run().outputs_path == str(tmp_path / "outputs" / "version_0")
    assert caplog.messages == [f"POLYAXON_NO_OP is true: outputs go to {tmp_path}/outputs/version_0"]


# Datasets


def test_datasets_off_the_cluster_are_where_the_mapping_says(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert Run(datasets={"digits": Path("data")}).data_path("digits") == "data"


def test_datasets_on_the_cluster_are_where_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, json.dumps({"digits": str(tmp_path)}))
    run = Run(datasets={"digits": "not/used"})
    assert run.data_path("digits") == str(tmp_path)
    assert Run(datasets=["digits"]).data_path("digits") == str(tmp_path)


def test_all_wrong_datasets_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, json.dumps({"digits": str(tmp_path), "gone": "/not/there"}))
    assert message(datasets=["digit", "digits", "gone", "faces"]) == (
        "Received the dataset name 'digit'. Expected one of those in POLYAXON_RUN_DATA_PATHS: 'digits', 'gone'. Did you mean "
        "'digits'?\n"
        "The dataset 'gone' is expected at '/not/there', according to POLYAXON_RUN_DATA_PATHS, and there is nothing. Correct "
        "the path, or put the data there.\n"
        "Received the dataset name 'faces'. Expected one of those in POLYAXON_RUN_DATA_PATHS: 'digits', 'gone'."
    )


def test_a_local_dataset_that_is_not_there() -> None:
    assert message(datasets={"digits": "data/digits"}) == (
        "The dataset 'digits' is expected at 'data/digits', according to `datasets=`, and there is nothing. Correct the path, or "
        "put the data there."
    )


def test_a_dataset_that_is_a_file_where_a_directory_is_expected(tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("0,1")
    for path in (f"{tmp_path}/digits/", f"{tmp_path}/digits/train"):
        assert message(datasets={"digits": path}) == (
            f"The dataset 'digits' is expected at '{path}', according to `datasets=`, and '{tmp_path}/digits' is a file, not a "
            f"directory. Correct the path."
        )


def test_an_empty_dataset_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    Run(datasets={name: tmp_path / name for name in ("file", "empty", "full")})
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"The dataset 'file' is empty: '{tmp_path}/file'",
        f"The dataset 'empty' is empty: '{tmp_path}/empty'",
    ]


def test_a_dataset_on_a_mount_whose_server_is_gone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with without_a_server(tmp_path / "data"):
        assert message(datasets={"digits": "data/digits"}) == (
            "The dataset 'digits' is expected at 'data/digits', according to `datasets=`, and cannot be read: Transport endpoint "
            "is not connected. Mount the volume again, because its server does not respond, or correct the path."
        )


def test_only_names_are_not_enough_off_the_cluster() -> None:
    assert message(datasets=["digits"]).startswith(f"Received the dataset name 'digits', but {DATA} is not set")


def test_a_string_in_place_of_a_list() -> None:
    assert message(datasets="digits") == (
        "Received datasets='digits', a string. Expected a list of names, such as ['digits'], or a mapping from name to the path "
        "on this machine, such as {'digits': 'data/digits'}."
    )


def test_paths_and_names_are_shown_whole_though_a_word_in_them_may_precede_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA, json.dumps({"tokens": "/data/tokens/wiki", "secret-santa": str(tmp_path)}))
    assert message(datasets=["tokens", "token"]) == (
        f"The dataset 'tokens' is expected at '/data/tokens/wiki', according to {DATA}, and there is nothing. Correct the path, "
        f"or put the data there.\n"
        f"Received the dataset name 'token'. Expected one of those in {DATA}: 'tokens', 'secret-santa'. Did you mean 'tokens'?"
    )
    outputs = tmp_path / "tokenizer" / "7"
    outputs.parent.write_text("")
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(outputs))
    assert message().startswith(f"Received the outputs path '{outputs}', which cannot be written to")
    monkeypatch.setenv(DATA, json.dumps({"tokens": "s3://key:hunter2@bucket/tokens?token=hunter2"}))
    assert "hunter2" not in message(datasets=["token"])


def test_a_string_in_place_of_a_list_shows_no_secret() -> None:
    assert "hunter2" not in message(datasets="s3://key:hunter2@bucket/digits")


def test_names_from_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, json.dumps({"digits": str(tmp_path)}))
    assert Run(datasets=(name for name in ["digits"])).data_path("digits") == str(tmp_path)


def test_a_dataset_that_was_not_asked_for(tmp_path: Path) -> None:
    run = Run(datasets={"digits": tmp_path})
    with pytest.raises(TrackingError) as error:
        run.data_path("digit")
    assert str(error.value) == (
        "Received the dataset name 'digit'. Expected one of those given as `datasets=`: 'digits'. Did you mean 'digits'?"
    )


# Levels


@pytest.mark.parametrize(
    ("value", "level"),
    [
        ("debug", logging.DEBUG),
        ("WARN", logging.WARNING),
        ("FATAL", logging.CRITICAL),
        ("15", 15),
        ("notset", logging.NOTSET),
    ],
)
def test_the_level_of_the_named_loggers_follows_the_run(
    value: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAXON_LOG_LEVEL", value)
    Run(loggers=["mine"])
    assert logging.getLogger("mine").level == level
    assert logging.getLogger("polyaxon_tracking").level == level
    logging.getLogger("mine").setLevel(logging.NOTSET)


def test_without_a_level_loggers_are_not_changed() -> None:
    Run(loggers=["mine"])
    assert logging.getLogger("mine").level == logging.NOTSET


# How often


@pytest.mark.parametrize(
    ("on_cluster", "resume", "resumes"),
    [
        (True, None, True),
        (True, False, False),
        (True, True, True),
        (False, None, False),
        (False, True, True),
        (False, False, False),
    ],
)
def test_when_a_training_resumes(
    on_cluster: bool, resume: bool | None, resumes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if on_cluster:
        monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(tmp_path))
    assert Run(resume=resume).should_resume is resumes


class Model:
    """One that is equal to every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_each_training_of_a_script_has_its_own_checkpoints(outputs: Path) -> None:
    def place(*objects: object) -> str:
        return os.path.relpath(Run().checkpoint_manager(*objects).directory, outputs / "checkpoints")

    models = [Model(), Model(), Model()]
    assert [place(model) for model in models] == ["resume", "resume-2", "resume-3"]
    assert place(models[1]) == "resume-2"  # it has not finished, and continues
    Run().mark_finished(Run().checkpoint_manager(models[1]))
    assert place(models[1]) == "resume-4"  # its next stage
    assert place(models[0]) == "resume"
    assert place(models[0], models[1]) == "resume-5"
    assert place(models[0], models[2]) == "resume-6"
    assert place(models[0], models[1]) == "resume-5"


def test_a_named_training_keeps_its_place_whatever_came_before(outputs: Path) -> None:
    def place(name: str) -> str:
        return os.path.relpath(Run(name=name).checkpoint_manager(Model()).directory, outputs / "checkpoints")

    assert place("fold-2") == "fold-2/resume"
    assert place("fold-1") == "fold-1/resume"
    assert place("fold-1") == "fold-1/resume-2"  # of another model: another training
    run = Run(name="lr=0.1")
    assert os.path.relpath(run.checkpoint_path("best.keras"), outputs) == "checkpoints/lr=0.1/best.keras"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "resume", "resume-2", 3])
def test_a_name_that_is_no_directory_of_a_training_is_refused(name: Any) -> None:
    with pytest.raises(TrackingError) as error:
        Run(name=name)
    assert str(error.value) == (
        f"Received name={name!r}. Expected the name of a directory for this training, such as 'fold-3': not empty, "
        f"without '/', and not 'resume'."
    )


def test_another_outputs_path_counts_from_the_first(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    Run().checkpoint_manager(model)
    monkeypatch.setenv("POLYAXON_RUN_OUTPUTS_PATH", str(outputs / "other"))
    assert Run().checkpoint_manager(model).directory == str(outputs / "other" / "checkpoints" / "resume")


def test_a_model_is_not_held_and_the_next_one_at_its_address_is_another(outputs: Path) -> None:
    directories = set()
    for _ in range(50):  # CPython gives the memory of one that was freed to the next
        model = Model()
        reference = weakref.ref(model)
        directories.add(Run().checkpoint_manager(model).directory)
        del model
        assert reference() is None
    assert len(directories) == 50


def test_trainings_that_begin_in_several_threads_share_no_checkpoints(outputs: Path) -> None:
    models = [Model() for _ in range(64)]
    run = Run()
    with ThreadPoolExecutor(8) as threads:
        directories = list(threads.map(lambda model: run.checkpoint_manager(model).directory, models))
    assert len(set(directories)) == 64


# Names of checkpoints


def test_a_checkpoint_is_below_the_checkpoints_path(outputs: Path) -> None:
    assert Run().checkpoint_path("a/best.pt") == str(outputs / "checkpoints" / "a" / "best.pt")


def test_a_name_that_climbs_out_is_refused(outputs: Path) -> None:
    with pytest.raises(TrackingError, match="Expected a relative name that stays below it"):
        Run().checkpoint_path("../best.pt")


@pytest.mark.parametrize("inside", [True, False])
def test_an_absolute_path_is_kept(
    inside: bool, outputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str((outputs if inside else tmp_path) / "best.pt")
    assert Run().checkpoint_path(path) == path
    warning = f"Checkpoints go to {path}, outside the outputs path {outputs}, and may be lost with the pod. Leave the path out, or choose one below it"
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", warning)] * (not inside)


def test_a_string_in_place_of_a_list_of_loggers() -> None:
    assert message(loggers="mine") == "Received loggers='mine', a string. Expected a list of names: ['mine']."


def test_what_is_no_dataset_name(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"^Received the dataset name 3\. Expected a string, such as 'digits'\.$"):
        Run().data_path(3)  # type: ignore[arg-type]


def test_datasets_of_wrong_types() -> None:
    assert message(datasets=[3]) == "Received datasets with the names [3]. Expected the names to be strings."
    assert message(datasets={"digits": None}) == (
        "Received datasets without a path: ['digits']. Expected a path on this machine for each, or a list of names if "
        "the cluster knows all of them."
    )


def test_an_object_store_is_outside_the_outputs_path(outputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run().warn_if_outside("s3://key:secret@bucket/run")
    assert caplog.messages == [
        f"Checkpoints go to s3://***@bucket/run, outside the outputs path {outputs}, and may be lost with the pod. Leave the path out, or choose one below it"
    ]
