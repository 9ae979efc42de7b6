"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedgraft.errors import RunError
from fedgraft.files import (
    read_tensors,
    remove_debris,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    write_text(tmp_path / "text", "Grüße\n")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "text").read_bytes() == "Grüße\n".encode()
    assert listing(tmp_path) == ["a", "b", "file", "text"]  # nothing temporary is left


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    child = os.fork()
    if child == 0:  # the new process dies where the file is written and not yet renamed
        Path.replace = lambda *_: os._exit(9)  # type: ignore[method-assign]
        write_bytes(path, b"new" * 1000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == b"old"
    write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        kind = os.fstat(descriptor).st_mode
        done.append("sync folder" if stat.S_ISDIR(kind) else "sync file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_bytes(tmp_path / "file", b"x")
    assert done == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_while_writing_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def interrupted(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["file"]


# Full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_with_a_remedy(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"the disk is full: {path} could not be written") as caught:
        write_bytes(path, b"new")
    assert "Free some space" in caught.value.remedy
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["file"]


def test_a_disk_that_is_really_full(full_disk: Path):
    small = {"x": torch.zeros(4)}
    (full_disk / "ballast").unlink()
    write_tensors(full_disk / "x.safetensors", small)
    with pytest.raises(RunError, match="the disk is full"):
        write_tensors(full_disk / "x.safetensors", {"x": torch.zeros(1_000_000)})
    assert read_tensors(full_disk / "x.safetensors")[0]["x"].tolist() == [0.0] * 4
    assert listing(full_disk) == ["x.safetensors"]
    write_text(full_disk / "y", "and there is room again")


def test_a_full_disk_cannot_even_take_a_new_folder(full_disk: Path):
    with pytest.raises(RunError, match="the disk is full"):
        write_text(full_disk / "folder" / "file", "x" * 5000)


def test_other_refusals_name_the_file(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"file/inner could not be written: "):
        write_text(tmp_path / "file" / "inner", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder could not be written: "):
        write_text(tmp_path / "folder", "x")
    assert listing(tmp_path) == ["file", "folder"]


def test_a_folder_that_cannot_be_synced_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sync = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not supported")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"


# Formats


def test_json_is_strict(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": 1, "a": [1.5, None, True]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": 1, "a": [1.5, None, True]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text())["b"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_come_back_bit_for_bit_with_their_notes(dtype: torch.dtype, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    values = torch.arange(6).reshape(2, 3).to(dtype)
    tensors = {"a": values, "b": values.T, "same memory": values, "scalar": values[0, 0]}
    write_tensors(path, tensors, {"round": 3, "nested": {"x": [0.1]}})
    back, notes = read_tensors(path)
    assert notes == {"round": 3, "nested": {"x": [0.1]}}
    assert set(back) == set(tensors) == set(load_file(path))  # anybody's safetensors reads it
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor)


def test_equal_tensors_make_equal_files(tmp_path: Path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    written = set()
    for number in range(8):
        path = tmp_path / str(number)
        write_tensors(path, tensors, {"x": 1, "y": 2})
        write_tensors(path, dict(reversed(tensors.items())), {"y": 2, "x": 1})
        written.add(path.read_bytes())
    assert len(written) == 1
    write_tensors(tmp_path / "x", tensors)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # which transformers and PEFT ask for


def test_files_of_others_have_no_notes(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors")[1] == {}


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_damaged_tensors_are_an_error_that_names_the_file(keep: int, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {"round": 3})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=f"{path} cannot be read"):
        read_tensors(path)


def test_missing_tensors_are_an_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(RunError, match="none cannot be read"):
        read_tensors(tmp_path / "none")
    (tmp_path / "noise").write_bytes(bytes(range(200)))
    with pytest.raises(RunError, match="noise cannot be read"):
        read_tensors(tmp_path / "noise")


def test_debris_of_killed_processes_is_removed_and_nothing_else(tmp_path: Path):
    whole = [tmp_path / "x.tmp", tmp_path / ".hidden", tmp_path / "below" / "x"]
    debris = [tmp_path / ".x.17.tmp", tmp_path / "below" / ".x.18.tmp"]
    (tmp_path / "below").mkdir()
    for path in (*whole, *debris):
        path.write_text("x")
    remove_debris(tmp_path)
    assert [path.exists() for path in whole] == [True] * 3
    assert [path.exists() for path in debris] == [False] * 2
    remove_debris(tmp_path / "nowhere")
