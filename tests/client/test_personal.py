"""Personal state: versions by round, kept as long as the server may resume from before them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.personal import PersonalStore
from fedgraft.adapter import Tensors
from fedgraft.errors import RunError


def state(value: float) -> Tensors:
    return {"x": torch.tensor([value])}


def loaded(store: PersonalStore, before: int) -> float | None:
    found = store.load(before)
    return None if found is None else float(found["x"])


def rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.rglob("round-*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> PersonalStore:
    return PersonalStore(tmp_path, "lineage", "3")


def test_the_newest_state_before_a_round_is_loaded(store: PersonalStore):
    assert loaded(store, 1) is None
    for round in (1, 2, 5):  # rounds 3 and 4 did not sample the client
        store.save(state(round), round, durable_round=0)
    assert [loaded(store, before) for before in (1, 2, 3, 5, 6, 99)] == [None, 1, 2, 2, 5, 5]


def test_a_round_that_runs_again_replaces_its_state(store: PersonalStore):
    store.save(state(1), 1, 0)
    store.save(state(2), 2, 0)
    assert loaded(store, 2) == 1  # round 2 again starts from what it started from
    store.save(state(22), 2, 0)
    assert loaded(store, 3) == 22


def test_with_a_checkpoint_each_round_two_versions_stay(store: PersonalStore, tmp_path: Path):
    for round in range(1, 8):
        store.save(state(round), round, durable_round=max(0, round - 2))
        assert len(rounds(tmp_path)) <= 3
    assert rounds(tmp_path) == [5, 6, 7]


def test_every_version_that_a_resume_can_ask_for_stays(store: PersonalStore, tmp_path: Path):
    # The client is sampled in some rounds only and the server keeps every checkpoint from 6 on:
    # whatever round from 7 on it goes on with, the state is the one of that time.
    for round in (2, 4, 7, 9):
        store.save(state(round), round, durable_round=6)
    assert rounds(tmp_path) == [4, 7, 9]
    assert [loaded(store, before) for before in (7, 8, 9, 10)] == [4, 7, 7, 9]


def test_clients_and_lineages_do_not_meet(tmp_path: Path):
    stores = [
        PersonalStore(tmp_path, lineage, client)
        for lineage, client in [("a", "1"), ("a", "2"), ("b", "1"), ("a1", ""), ("a", "../../1")]
    ]
    for number, store in enumerate(stores):
        store.save(state(number), 1, 0)
    assert [loaded(store, 2) for store in stores] == [0, 1, 2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 5  # and nothing is written elsewhere


def test_damaged_state_is_an_error_that_names_the_file(store: PersonalStore, tmp_path: Path):
    store.save(state(1), 1, 0)
    (path,) = tmp_path.rglob("round-*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match=f"{path} cannot be read"):
        store.load(2)


def test_other_files_are_left_alone(store: PersonalStore, tmp_path: Path):
    store.save(state(1), 1, 0)
    (home,) = tmp_path.iterdir()
    for name in ("round-x.safetensors", ".round-000001.safetensors.9.tmp", "notes.txt"):
        (home / name).write_text("")
    store.save(state(9), 9, durable_round=8)
    assert loaded(store, 99) == 9 and len(list(home.iterdir())) == 5


def test_what_was_kept_of_an_update_that_did_not_count_is_void(store: PersonalStore):
    for round in (1, 2, 3):
        store.save(state(round), round, durable_round=0)
    found = store.load(4, counted=1)  # the server refused the updates of rounds 2 and 3
    assert found is not None and float(found["x"]) == 1
    assert loaded(store, 4) == 1  # and they are gone
    store.save(state(4), 4, durable_round=3)
    found = store.load(4, counted=1)  # round 4 again, from the checkpoint of round 3
    assert found is not None and float(found["x"]) == 1
    assert store.load(5, counted=0) is None
