"""Checkpoints: whole or not there, and all that the next round depends on."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.errors import RunError
from fedgraft.files import read_tensors, write_tensors
from server.checkpoint import Checkpoint, Checkpoints
from strategies.rounds import StrategyState


def adapter(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    layers = {f"m.{k}.q": LoraLayer(normal(2, 3), normal(3, 2), 0.5 + k) for k in (10, 2)}
    return Adapter(layers, {"m.head.bias": normal(4)})


def checkpoint(round: int, *, best: Adapter | None = None, rule: bool = True) -> Checkpoint:
    own = {"m.2.q::mean": torch.full((2,), float(round))} if rule else {}
    state = StrategyState(round, adapter(round), own, counted={"0": round, "1": 2})
    return Checkpoint(state, state.adapter if best is None else best, {"stale": round, "x": [0.1]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def equal(one: Adapter | None, other: Adapter | None) -> bool:
    if one is None or other is None:
        return one is other
    same = one.digest() == other.digest() and one.scalings == other.scalings
    return same and list(one.tensors()) == list(other.tensors())


def test_a_checkpoint_comes_back_to_the_bit(folder: Path):
    saved = checkpoint(3, best=adapter(99))
    Checkpoints(folder, keep=2).save(saved)
    found = Checkpoints(folder, keep=2).latest()
    assert found is not None and found.state.round == 3
    assert equal(found.state.adapter, saved.state.adapter) and equal(found.best, saved.best)
    assert found.state.rule.keys() == {"m.2.q::mean"}
    assert torch.equal(found.state.rule["m.2.q::mean"], saved.state.rule["m.2.q::mean"])
    assert found.notes == {"stale": 3, "x": [0.1]}


def test_the_best_adapter_is_written_once_where_it_is_the_current_one(folder: Path):
    checkpoints = Checkpoints(folder, keep=9)
    checkpoints.save(checkpoint(1))
    checkpoints.save(checkpoint(2, best=adapter(1)))
    one, two = (read_tensors(folder / f"round-00000{k}.safetensors")[0] for k in (1, 2))
    assert len(one) == 5 + 1 and len(two) == 2 * 5 + 1
    found = checkpoints.latest()
    assert found is not None and equal(found.best, adapter(1))
    (folder / "round-000002.safetensors").unlink()
    found = checkpoints.latest()
    assert found is not None and found.best is found.state.adapter


def test_before_any_evaluation_there_is_no_best(folder: Path):
    state = StrategyState(0, adapter(0))
    Checkpoints(folder, keep=2).save(Checkpoint(state, None))
    found = Checkpoints(folder, keep=2).latest()
    assert found is not None and found.best is None and found.notes == {} and found.state.rule == {}


def test_the_newest_few_are_kept(folder: Path):
    checkpoints = Checkpoints(folder, keep=3)
    assert checkpoints.latest() is None and checkpoints.oldest_round() == 0
    for round in (0, 9, 10, 100, 11):  # by number, not by name or age
        checkpoints.save(checkpoint(round))
    assert names(folder) == [f"round-{k:06d}.safetensors" for k in (10, 11, 100)]
    assert checkpoints.oldest_round() == 10
    found = checkpoints.latest()
    assert found is not None and found.state.round == 100


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(os.urandom(len(content)))
    elif how == "foreign":  # a whole safetensors file, but no checkpoint
        write_tensors(path, {"x": torch.zeros(2)})
    elif how == "half an adapter":
        tensors, notes = read_tensors(path)
        write_tensors(path, {n: t for n, t in tensors.items() if "lora_A" not in n}, notes)
    elif how == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "foreign", "half an adapter", "a folder"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    how: str, folder: Path, caplog: pytest.LogCaptureFixture
):
    checkpoints = Checkpoints(folder, keep=2)
    for round in (1, 2):
        checkpoints.save(checkpoint(round))
    damage(folder / "round-000002.safetensors", how)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None and found.state.round == 1
    assert "round-000002.safetensors" in caplog.text
    if how != "a folder":
        checkpoints.save(checkpoint(2))  # the run goes on, and the damaged one is replaced
        found = checkpoints.latest()
        assert found is not None and found.state.round == 2


@pytest.mark.parametrize("how", ["cut", "foreign"])
def test_all_damaged_is_an_error_and_not_a_new_start(how: str, folder: Path):
    checkpoints = Checkpoints(folder, keep=2)
    for round in (1, 2):
        checkpoints.save(checkpoint(round))
        damage(folder / f"round-00000{round}.safetensors", how)
    with pytest.raises(RunError, match=f"no checkpoint in {folder} can be read") as caught:
        checkpoints.latest()
    assert "backup" in caught.value.remedy


def test_what_was_being_written_when_a_run_was_killed_is_never_read(folder: Path):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(checkpoint(1))
    whole = (folder / "round-000001.safetensors").read_bytes()
    (folder / ".round-000002.safetensors.123.tmp").write_bytes(whole[:100])
    (folder / "round-000003.safetensors.bak").write_bytes(b"")
    (folder / "round-x.safetensors").write_bytes(b"")
    found = checkpoints.latest()
    assert found is not None and found.state.round == 1


def test_a_process_killed_while_writing_leaves_the_checkpoints_before(folder: Path):
    checkpoints = Checkpoints(folder, keep=2)
    for round in (1, 2):
        checkpoints.save(checkpoint(round))
    child = os.fork()
    if child == 0:
        Path.replace = lambda *_: os._exit(9)  # type: ignore[method-assign]
        checkpoints.save(checkpoint(3))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [name for name in names(folder) if not name.startswith(".")] == [
        "round-000001.safetensors",
        "round-000002.safetensors",
    ]
    found = checkpoints.latest()
    assert found is not None and found.state.round == 2


def test_a_full_disk_leaves_the_checkpoints_before(full_disk: Path):
    (full_disk / "ballast").unlink()
    checkpoints = Checkpoints(full_disk / "checkpoints", keep=1)
    checkpoints.save(checkpoint(1))
    large = Adapter({"m.q": LoraLayer(torch.zeros(8, 40_000), torch.zeros(8, 8))})
    with pytest.raises(RunError, match="the disk is full"):
        checkpoints.save(Checkpoint(StrategyState(2, large), None))
    found = checkpoints.latest()
    assert found is not None and found.state.round == 1
