"""The spool: what goes in comes out, by layer and in the order of names, whatever clients send."""

from __future__ import annotations

import errno
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import LAYER, federation
from safetensors.torch import load_file

from fedgraft.adapter import LoraLayer
from fedgraft.errors import RunError, UpdateError
from strategies.spool import UpdateSpool

A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
CURRENT = LoraLayer(torch.full((2, 3), 7.0), torch.full((4, 2), 9.0), 2.0)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)


@pytest.mark.parametrize("memory", [0, 1000])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
)
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    update = {
        "head.bias": torch.tensor(3, dtype=dtype),  # no axis at all
        B: values(4, 2, dtype=dtype),
        "head.empty": values(0, 5, dtype=dtype),
        A: values(6, 2, dtype=dtype)[::2].T,  # not contiguous
    }
    spool = UpdateSpool(tmp_path, memory)
    spool.add("0", 1.0, update)
    assert bool(list(tmp_path.iterdir())) == (memory == 0)
    layer = spool.layer("0", LAYER, CURRENT)
    assert torch.equal(layer.A, update[A]) and layer.A.dtype == dtype
    assert torch.equal(layer.B, update[B]) and layer.scaling == 2.0
    for name in ("head.bias", "head.empty"):
        assert torch.equal(spool.extra("0", name), update[name])
        assert spool.extra("0", name).dtype == dtype


def test_files_are_safetensors_that_others_can_read(tmp_path: Path) -> None:
    update = {A: values(2, 3), B: values(4, 2, dtype=torch.bfloat16), "näme": values(1)}
    spool = UpdateSpool(tmp_path)
    spool.add("0", 1.0, update)
    (file,) = tmp_path.iterdir()
    read = load_file(file)
    assert read.keys() == update.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in update.items())


def test_what_memory_does_not_hold_is_written(tmp_path: Path) -> None:
    """An update of 56 bytes: two of three fit into 120, and again after the round."""
    spool = UpdateSpool(tmp_path, memory=120)
    for _ in range(2):
        for client in "abc":
            spool.add(client, 1.0, {A: values(2, 3) + ord(client), B: values(4, 2)})
        assert [path.name for path in tmp_path.iterdir()] == ["update-000002.safetensors"]
        for client in "abc":
            layer = spool.layer(client, LAYER, CURRENT)
            assert torch.equal(layer.A, values(2, 3) + ord(client))
            assert torch.equal(layer.B, values(4, 2))
        spool.clear()
        assert list(tmp_path.iterdir()) == [] and spool.clients == []


@pytest.mark.parametrize("memory", [0, 1000])
def test_an_update_without_tensors_says_so(tmp_path: Path, memory: int) -> None:
    spool = UpdateSpool(tmp_path, memory)
    spool.add("0", 1.0, {})
    assert spool.layer("0", LAYER, CURRENT).A is CURRENT.A
    with pytest.raises(UpdateError, match=r"'0' has no tensor 'head.bias'"):
        spool.extra("0", "head.bias")


def test_a_factor_that_did_not_travel_is_the_current_one(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    spool.add("0", 1.0, {B: values(4, 2)})
    spool.add("1", 1.0, {A: values(2, 3), B: values(4, 2)})
    assert spool.layer("0", LAYER, CURRENT).A is CURRENT.A
    only_b = spool.layer("1", LAYER, CURRENT, frozenset({"B"}))
    assert only_b.A is CURRENT.A and torch.equal(only_b.B, values(4, 2))


def test_clients_come_in_natural_order_with_their_shares(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    for name, weight in [("site-10", 1.0), ("site-9", 2.0), ("1", 2.0), ("01", 3.0)]:
        spool.add(name, weight, {B: values(1)})
    assert spool.clients == ["01", "1", "site-9", "site-10"]
    assert list(spool.shares.values()) == [3 / 8, 2 / 8, 2 / 8, 1 / 8]
    spool.add("site-2", 8.0, {B: values(1)})
    assert list(spool.shares.values()) == [3 / 16, 2 / 16, 8 / 16, 2 / 16, 1 / 16]


@pytest.mark.parametrize("order", list(permutations([1e16, 1.0, 1.5])))
def test_shares_do_not_depend_on_arrival(tmp_path: Path, order: tuple[float, ...]) -> None:
    """1e16 + 1 + 1.5 is 1e16 + 2; one by one, 1e16 + 1.5 + 1 comes to 1e16 + 4."""
    spool = UpdateSpool(tmp_path)
    for weight in order:
        spool.add(f"{weight}", weight, {})
    assert spool.shares["1.5"] == 1.5 / 10000000000000002.0
    assert spool.shares["1e+16"] == 1e16 / 10000000000000002.0


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "CON", "", "x" * 500, "\x00", "é/…"])
def test_no_client_name_reaches_the_file_system(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "spool"
    spool = UpdateSpool(folder)
    spool.add(name, 1.0, {B: values(4, 2)})
    assert torch.equal(spool.layer(name, LAYER, CURRENT).B, values(4, 2))
    assert [path.name for path in folder.iterdir()] == ["update-000000.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_clear_and_a_new_spool_start_empty(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    spool.add("0", 1.0, {B: values(4, 2)})
    (tmp_path / "notes.safetensors").touch()  # not the spool's: stays
    spool.clear()
    assert spool.clients == [] and spool.shares == {}
    spool.add("0", 1.0, {B: values(1)})
    UpdateSpool(tmp_path)  # after a crash, say
    assert [path.name for path in tmp_path.iterdir()] == ["notes.safetensors"]


def test_a_second_update_of_one_client_is_refused(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    spool.add("0", 1.0, {B: values(4, 2)})
    with pytest.raises(UpdateError, match="client '0' sent a second update"):
        spool.add("0", 1.0, {B: values(4, 2)})


def test_errors_name_client_and_tensor(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    with pytest.raises(UpdateError, match=r"'head' of client '0' has dtype torch\.complex64"):
        spool.add("0", 1.0, {"head": torch.zeros(2, dtype=torch.complex64)})
    spool.add("0", 1.0, {B: values(4, 2)})
    with pytest.raises(UpdateError, match="client '0' has no tensor 'head'"):
        spool.extra("0", "head")


def test_a_full_disk_names_the_folder_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = UpdateSpool(tmp_path)

    def no_space(tensor: torch.Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("strategies.spool._bytes_of", no_space)
        with pytest.raises(RunError) as caught:
            spool.add("0", 1.0, {B: values(4, 2)})
    assert str(tmp_path) in caught.value.message and "No space left" in caught.value.message
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == [] and spool.clients == []
    spool.add("0", 1.0, {B: values(4, 2)})  # once there is room again


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path)
    (tmp_path / "update-000000.safetensors").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left on device"):
        spool.add("0", 1.0, {B: values(400, 200)})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be spooled in"):
        UpdateSpool(tmp_path / "file" / "spool")


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_files_changed_under_the_run_are_noticed(tmp_path: Path, damage: str) -> None:
    spool = UpdateSpool(tmp_path)
    spool.add("0", 1.0, {B: values(4, 2)})
    (file,) = tmp_path.iterdir()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"update-000000\.safetensors cannot be read"):
        spool.layer("0", LAYER, CURRENT)


def test_only_the_layer_asked_for_is_read(tmp_path: Path) -> None:
    fed = federation(np.random.default_rng(0), d_out=4, d_in=3, r=2, weights=[1.0], layers=5)
    spool = UpdateSpool(tmp_path)
    ((client, (weight, tensors)),) = fed.updates.items()
    spool.add(client, weight, tensors)
    (file,) = tmp_path.iterdir()
    # cut away all but the first tensors: the first layer can still be read, the last one cannot
    names = list(fed.current.layers)
    file.write_bytes(file.read_bytes()[: -sum(t.nbytes for t in list(tensors.values())[2:])])
    layer = spool.layer(client, names[0], fed.current.layers[names[0]])
    assert torch.equal(layer.B, tensors[f"{names[0]}.lora_B.weight"])
    with pytest.raises(RunError):
        spool.layer(client, names[-1], fed.current.layers[names[-1]])
