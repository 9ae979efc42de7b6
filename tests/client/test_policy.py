"""The client's policy: every clause refuses what it names, with client and clause, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.policy import DAY, EXAMPLE, Policy, RoundsBegun
from fedgraft.config import Config
from fedgraft.errors import ConfigError, PolicyError, RunError
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Entry, Ledger

EXAMPLE_MODE = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}


def policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return Policy.load(path)


@pytest.mark.parametrize(
    ("clause", "breaks", "keeps", "said"),
    [
        (
            'privacy-mode = "example"',
            {"privacy.mode": "client", "privacy.noise-multiplier": 1.0},
            EXAMPLE_MODE,
            'privacy-mode: the run\'s privacy.mode is "client", and at least "example" is wanted',
        ),
        (
            'privacy-mode = "client"',
            {},
            {"privacy.mode": "local", "privacy.noise-multiplier": 1.0},
            'privacy-mode: the run\'s privacy.mode is "none"',
        ),
        (
            "noise-multiplier = 0.8",
            EXAMPLE_MODE | {"privacy.noise-multiplier": 0.79},
            EXAMPLE_MODE | {"privacy.noise-multiplier": 0.8},
            "noise-multiplier: the run's noise is 0.79 times its clip, and at least 0.8",
        ),
        ("noise-multiplier = 0.8", {}, EXAMPLE_MODE, "noise-multiplier: the run adds no noise"),
        (
            "largest-clip = 0.5",
            EXAMPLE_MODE | {"privacy.clip": 0.6},
            EXAMPLE_MODE | {"privacy.clip": 0.5},
            "largest-clip: privacy.clip is 0.6, and at most 0.5 is allowed",
        ),
        (
            "largest-clip = 0.5",
            {},
            EXAMPLE_MODE | {"privacy.clip": 0.1},
            "largest-clip: the run clips nothing",
        ),
        (
            "lifetime-epsilon = 3.0",
            {"privacy.mode": "client", "privacy.noise-multiplier": 1.0},
            EXAMPLE_MODE,
            'lifetime-epsilon: the run\'s privacy.mode is "client", whose cost no ledger here',
        ),
        (
            'tasks = ["digits"]',
            {"task.name": "causal-lm"},
            {},
            'tasks: the run\'s task.name is "causal-lm", which is not on its list',
        ),
        (
            'adapter-types = ["lora"]',
            {"adapter.type": "dora"},
            {},
            'adapter-types: the run\'s adapter.type is "dora"',
        ),
        (
            "largest-rank = 8",
            {"adapter.rank": 9},
            {"adapter.rank": 8},
            "largest-rank: the adapter's largest rank is 9, and at most 8 is allowed",
        ),
        ("largest-rank = 8", {"adapter.rank-pattern": {"q_proj": 16}}, {}, "largest rank is 16"),
    ],
)
def test_each_clause(
    clause: str, breaks: dict[str, Any], keeps: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = policy(tmp_path, clause)
    made.check_run("north", Config().with_overrides(keeps))
    with pytest.raises(PolicyError) as caught:
        made.check_run("north", Config().with_overrides(breaks))
    assert caught.value.message.startswith("policy of client north, ") and said in str(caught.value)


def test_no_clause_allows_anything(tmp_path: Path) -> None:
    made = policy(tmp_path, "")
    made.check_run("north", Config().with_overrides({"adapter.rank": 512}))
    made.check_base("north", "")
    made.check_budget("north", tmp_path / "ledger.jsonl")
    assert made.allows("loss") and made.allows("description")


def test_bases_are_listed_by_their_hash(tmp_path: Path) -> None:
    known = "ab" * 32
    made = policy(tmp_path, f'bases = ["{known}"]')
    made.check_base("north", known)
    with pytest.raises(PolicyError, match="north, bases: the base cdcdcdcdcdcd is not on its list"):
        made.check_base("north", "cd" * 32)
    with pytest.raises(PolicyError, match="bases: the request does not say which base"):
        made.check_base("north", "")


def test_the_lifetime_counts_whatever_the_data_were_encoded_as(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    release = Release((2.0,), 1.0)
    once = _spend(ledger, "one encoding", release)
    twice = _spend(ledger, "another encoding", release)
    spent = policy(tmp_path, f"lifetime-epsilon = {(once + twice) / 2}\ndelta = 1e-5")
    with pytest.raises(PolicyError, match="policy of client north, lifetime-epsilon: epsilon is"):
        spent.check_budget("north", ledger.path)
    left = policy(tmp_path, f"lifetime-epsilon = {twice + 1e-6}")
    left.check_budget("north", ledger.path)
    with pytest.raises(PolicyError, match="lifetime-epsilon: this round would bring epsilon to"):
        left.limits("north").check_lifetime(ledger, [release])


def _spend(ledger: Ledger, fingerprint: str, release: Release) -> float:
    from fedgraft.privacy.accounting import epsilon

    ledger.record(
        Entry(fingerprint, "run", 1, "example", "example", "add-or-remove-one", release, 1e-5)
    )
    return epsilon([entry.release for entry in ledger.entries], 1e-5)


def test_rounds_a_day_are_counted_over_restarts(tmp_path: Path) -> None:
    now = [1_000_000.0]
    for _ in range(2):
        RoundsBegun(tmp_path / "rounds.json", lambda: now[0]).begin("north", 2)
        now[0] += 3600
    again = RoundsBegun(tmp_path / "rounds.json", lambda: now[0])
    with pytest.raises(PolicyError, match=r"rounds-per-day: 2 rounds .* begin in 22\.0 hours"):
        again.begin("north", 2)
    again.begin("north", 3)
    now[0] = 1_000_000.0 + DAY + 1  # the first is a day old
    with pytest.raises(PolicyError, match="rounds-per-day"):
        again.begin("north", 2)
    again.begin("north", None)
    now[0] += DAY + 7200
    again.begin("north", 1)


def test_a_clock_put_back_does_not_stop_the_count(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    RoundsBegun(path, lambda: 5e9).begin("north", 1)
    with pytest.raises(PolicyError, match=r"in 24\.0 hours"):
        RoundsBegun(path, lambda: 1e9).begin("north", 1)


def test_a_damaged_count_is_not_read_as_none(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    path.write_text("[1.0, ")
    with pytest.raises(RunError, match="is damaged"):
        RoundsBegun(path).begin("north", 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("largest-rnk = 8", "unknown config key largest-rnk"),
        ('privacy-mode = "total"', "privacy-mode"),
        ("rounds-per-day = 0", "rounds-per-day"),
        ('bases = ["abc"]', "'abc', which is no hash of a base"),
    ],
)
def test_a_policy_that_says_something_else_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        policy(tmp_path, text)


def test_the_example_is_a_policy(tmp_path: Path) -> None:
    text = EXAMPLE.format(bases='bases = ["%s"]' % ("ab" * 32), task='"digits"')
    made = policy(tmp_path, text)
    assert made.tasks == ["digits"] and made.allows("loss") and not made.allows("description")
    commented = [
        line.removeprefix("# ")
        for line in text.splitlines()
        if " = " in line[:24] or line.startswith("  ")
    ]
    whole = policy(tmp_path, "\n".join(commented))  # what is commented out is valid, too
    assert whole.lifetime_epsilon == 8.0 and whole.largest_clip == 1.0
