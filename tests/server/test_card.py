"""The card of an adapter: what it says of the run, and of the base."""

from __future__ import annotations

from typing import Any

import pytest

from fedgraft.config import Config
from fedgraft.resident_model import ResidentModel
from server.card import adapter_card

SUMMARY = {
    "privacy": None,
    "strategy": "lora-fair",
    "task": "digits",
    "clients": 2,
    "rounds": 3,
    "best_round": 2,
    "seed": 0,
    "metric": "accuracy",
    "initial": 0.41234,
    "final": 0.7,
    "test": {"initial": {"examples": 2142.0}, "final": {"examples": 2142.0}},
    "validation_examples": 360,
    "client_examples": {"0": 1200, "1": 340},
    "client_metric": {
        "clients": 2,
        "worst_client": "1",
        "worst": 0.5,
        "best_client": "0",
        "best": 0.75,
        "mean": 0.625,
        "sd": 0.125,
    },
}


def test_the_card_says_what_it_is_and_where_it_comes_from(tiny: Config, model: ResidentModel):
    card = adapter_card(tiny, model, "lineage-7", SUMMARY)
    for said in (
        'library_name: "peft"',
        f"`{model.base_hash}`",
        "`lineage-7`",
        "lora-fair",
        "round 2, the best on validation",
        "| 0.4123 |",
        "| 0.7000 |",
        "differential privacy | none",
        "| trained on it in | float32 |",
        "| training examples | 1,540 on 2 clients, 340 to 1,200 each |",
        "| validation and test examples | 360 and 2,142 |",
        "| validation accuracy by client, this adapter | worst 0.5000, best 0.7500, mean 0.6250, "
        "standard deviation 0.1250 (2 clients) |",
    ):
        assert said in card


@pytest.mark.parametrize(
    ("settings", "summary", "said"),
    [
        (
            {"model.quantization": "nf4", "model.dtype": "bfloat16", "model.revision": "abc1"},
            {},
            ", revision abc1 |\n| base hash | `{hash}` |\n| trained on it in | NF4, computing in "
            "bfloat16 |",
        ),
        ({}, {"clients": 3}, "1,540 on 2 clients that have trained, 340 to 1,200 each |"),
        ({}, {"client_examples": {}}, "| training examples | none: no client has trained |"),
        ({}, {"client_metric": None}, "| test accuracy, this adapter | 0.7000 |\n| differential"),
        ({}, {"validation_examples": None}, "| unknown and 2,142 |"),
    ],
)
def test_cards_of_other_runs(
    settings: dict[str, Any],
    summary: dict[str, Any],
    said: str,
    tiny: Config,
    model: ResidentModel,
):
    card = adapter_card(tiny.with_overrides(settings), model, "lineage-7", SUMMARY | summary)
    assert said.replace("{hash}", model.base_hash) in card


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, ", commit 89ab |"),
        ("v2", ", revision v2, commit 89ab |"),
        ("89ab", ", revision 89ab |"),
    ],
)
def test_a_card_names_the_commit_that_a_hub_base_was(
    asked: str | None,
    said: str,
    tiny: Config,
    model: ResidentModel,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(model, "base_commit", "89ab")
    config = tiny.with_overrides({"model.base": "org/base", "model.revision": asked})
    assert f"| base | org/base{said}" in adapter_card(config, model, "lineage-7", SUMMARY)


def test_a_card_of_a_run_that_had_an_adapter_to_start_from_says_so(
    tiny: Config, model: ResidentModel
):
    config = tiny.with_overrides({"adapter.from": "runs/first/adapter"})
    card = adapter_card(config, model, "lineage-8", SUMMARY)
    assert "| test accuracy, at the start (the adapter in `runs/first/adapter`) | 0.4123 |" in card
    assert "| lineage | `lineage-8`, started from the adapter in `runs/first/adapter` |" in card
    assert "untouched" not in card


def test_a_card_does_not_pass_a_shared_part_off_as_what_was_tested(
    tiny: Config, model: ResidentModel
):
    """Under FedSA-LoRA B stays with the clients: the file's product is zero, the figures theirs."""
    config = tiny.with_overrides({"strategy.name": "fedsa-lora"})
    card = adapter_card(config, model, "lineage-7", SUMMARY)
    assert "round 2, the part that clients share: what each keeps of its own is not in it" in card
    assert "| test accuracy, clients' own adapters (mean) | 0.7000 |" in card
    assert "this adapter | 0.7" not in card and "best on validation" not in card
