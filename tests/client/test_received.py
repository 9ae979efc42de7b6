"""The final adapter as a client keeps it: a PEFT folder, whatever the server has sent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client.app import app
from client.received import keep
from fedgraft.adapter import PREFIX, to_arrays
from fedgraft.errors import UpdateError
from fedgraft.files import read_tensors
from fedgraft.flower import set_identity, set_message_id
from fedgraft.messages import KEEP, FinalAdapter, Reply, TrainRequest

A = f"{PREFIX}layer.lora_A.weight"
TENSORS = {A: torch.arange(6.0).reshape(2, 3)}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "target_modules": ["layer"]}
LINEAGE = "0123456789abcdef" * 2
FINAL = FinalAdapter(to_arrays(TENSORS), json.dumps(SETTINGS), "# a card\n", LINEAGE)


def test_it_is_a_folder_that_peft_reads(tmp_path: Path) -> None:
    path = keep(FinalAdapter.decode(FINAL.encode()), tmp_path)
    assert path == tmp_path / LINEAGE
    assert torch.equal(read_tensors(path / "adapter_model.safetensors")[0][A], TENSORS[A])
    assert json.loads((path / "adapter_config.json").read_text()) == SETTINGS
    assert (path / "README.md").read_text() == "# a card\n"


def test_a_later_one_of_the_same_run_replaces_it(tmp_path: Path) -> None:
    keep(FINAL, tmp_path)
    path = keep(replace(FINAL, arrays=to_arrays({A: torch.ones(2, 3)})), tmp_path)
    assert torch.equal(read_tensors(path / "adapter_model.safetensors")[0][A], torch.ones(2, 3))
    assert [one.name for one in tmp_path.iterdir()] == [LINEAGE]


def test_settings_that_would_have_peft_import_code_are_left_out(tmp_path: Path) -> None:
    hostile = SETTINGS | {"auto_mapping": {"parent_library": "evil"}, "megatron_core": "evil"}
    path = keep(replace(FINAL, settings=json.dumps(hostile)), tmp_path)
    assert "evil" not in (path / "adapter_config.json").read_text()


def test_a_lineage_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    path = keep(replace(FINAL, lineage="../../etc"), folder)
    assert path == folder / hashlib.sha256(b"../../etc").hexdigest()[:32]


@pytest.mark.parametrize(
    ("final", "why"),
    [
        (replace(FINAL, settings="{"), "no JSON"),
        (replace(FINAL, settings="[]"), "not those of a LoRA adapter"),
        (replace(FINAL, settings='{"peft_type": "IA3"}'), "not those of a LoRA adapter"),
        (replace(FINAL, arrays=to_arrays({"../x": torch.ones(1)})), "'../x'"),
        (replace(FINAL, arrays=to_arrays({A: torch.tensor([float("nan")])})), "no finite numbers"),
        (replace(FINAL, arrays=to_arrays({})), "is empty"),
    ],
)
def test_what_is_no_adapter_is_refused(final: FinalAdapter, why: str, tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match=why):
        keep(final, tmp_path)
    assert list(tmp_path.iterdir()) == []


def answer(content: RecordDict, folder: Path) -> Reply:
    set_identity(1)
    message = Message(content, 2, KEEP)
    set_message_id(message, "one")
    context = Context(1, 2, {"adapters": str(folder)}, RecordDict(), {})
    reply: Message = app(message=message, context=context)
    return Reply.decode(reply.content)


def test_the_client_app_keeps_it_and_says_so(tmp_path: Path) -> None:
    assert answer(FINAL.encode(), tmp_path).refusal == ""
    assert (tmp_path / LINEAGE / "adapter_config.json").exists()


def test_the_client_app_refuses_what_is_none(tmp_path: Path) -> None:
    empty = TrainRequest(1, to_arrays(TENSORS)).encode()
    assert "settings are no JSON" in answer(empty, tmp_path).refusal
