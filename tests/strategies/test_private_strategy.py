"""The strategy that samples each client by itself, and the one that is private by client."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import NAMES, START, Bad, FakeGrid, Seen, nodes, run

from fedgraft.adapter import to_arrays
from fedgraft.config import Config
from fedgraft.errors import BudgetSpentError, ConfigError, RunError
from fedgraft.messages import Reply
from fedgraft.privacy.events import Release
from fedgraft.privacy.randomness import SeededRandomness
from strategies import fitness
from strategies.client_privacy import ClientPrivacy
from strategies.fitness import check_rule
from strategies.registry import build_rule, rule_class, rule_names
from strategies.sampling import sampled
from strategies.strategy import AdapterStrategy


def private(seed: int = 0, **others: Any) -> ClientPrivacy:
    def source(purpose: str, round: int) -> SeededRandomness:
        return SeededRandomness(np.random.default_rng([seed, round, len(purpose)]))

    fields = {"noise_multiplier": 1.0, "clip": 0.5, "rate": 1.0, "clients": 4} | others
    return ClientPrivacy(randomness=source, **fields)


@dataclass
class Watched(Seen):
    """Also keeps what rounds release, and ends the run before one that costs too much."""

    order: list[str] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    budget: int = 99
    spent: bool = False

    def on_release(self, round: int, release: Release) -> None:
        if len(self.releases) == self.budget:
            raise BudgetSpentError("the privacy budget is spent")
        self.order.append("release")
        self.releases.append(release)

    def on_sampled(self, round: int, clients: list[str]) -> None:
        self.order.append("asked")

    def on_budget_spent(self, outcome: Any) -> None:
        self.spent = True


# Poisson sampling


def test_each_client_is_sampled_by_itself() -> None:
    """Binomial counts, so that empty samples come as often as they should: 0.7^4 = 0.24."""
    rng = np.random.default_rng(0)
    drawn = [sampled(NAMES, 0.3, "poisson", rng) for _ in range(2000)]
    for name in NAMES:
        assert abs(sum(name in names for names in drawn) / 2000 - 0.3) < 0.05
    both = sum("0" in names and "1" in names for names in drawn) / 2000
    assert abs(both - 0.09) < 0.03
    assert abs(sum(not names for names in drawn) / 2000 - 0.7**4) < 0.05
    assert all(names == sorted(names) for names in drawn)


def test_an_empty_sample_changes_nothing_and_ends_no_run() -> None:
    seen = run(rounds=12, fraction=0.3, sampling="poisson", min_clients=2, evaluate_every=0)
    assert len(seen.outcomes) == 13
    sizes = [len(outcome.sampled) for outcome in seen.outcomes[1:]]
    assert 0 in sizes and len(set(sizes)) > 1
    for before, after in zip(seen.outcomes, seen.outcomes[1:], strict=False):
        same = before.state.adapter.digest() == after.state.adapter.digest()
        assert same == (not after.sampled)
        assert (after.notes == ("no client was sampled",)) == (not after.sampled)


def test_a_poisson_sample_that_fails_ends_the_run() -> None:
    silent = {f"c{name}": Bad(name, answer=lambda tensors: None) for name in NAMES}
    with pytest.raises(RunError, match="usable updates"):
        run(grid=FakeGrid(nodes(**silent)), fraction=0.9, sampling="poisson", deadline=0.05)


# Privacy by client


def test_a_round_is_on_the_record_before_anybody_is_asked() -> None:
    hooks = Watched()
    run("lora-fair", rounds=2, privacy=private(), hooks=hooks)
    assert hooks.order == ["release", "asked"] * 2
    assert [release.noise_multipliers for release in hooks.releases] == [(1.0, 1.0)] * 2
    assert hooks.releases[0].noise_multiplier == pytest.approx(1.0 / math.sqrt(2.0))


def test_a_round_that_costs_too_much_is_not_begun() -> None:
    hooks, grid = Watched(budget=2), FakeGrid(nodes())
    run(grid=grid, rounds=5, privacy=private(), hooks=hooks)
    assert hooks.spent and hooks.last.state.round == 2
    assert sum(message.metadata.message_type == "train" for message in grid.sent) == 2 * 4


@pytest.mark.parametrize("study", [True, False])
def test_the_log_names_a_client_in_trouble_only_in_a_study(
    study: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name would tell that it took part."""
    refuses = Bad("1", answer=lambda tensors: Reply(refusal="no disk").encode())
    run(grid=FakeGrid(nodes(c1=refuses)), rounds=1, privacy=private(study=study))
    assert ("Round 1, client 1: no disk" in caplog.text) == study
    assert ("Round 1, a client: no disk" in caplog.text) == (not study)


def test_clients_are_sampled_by_the_source_of_the_noise() -> None:
    counts = [len(o.sampled) for o in run(rounds=8, privacy=private(rate=0.4)).outcomes[1:]]
    assert len(set(counts)) > 1
    again = run(rounds=8, privacy=private(rate=0.4), seed=7)
    assert [len(o.sampled) for o in again.outcomes[1:]] == counts


def test_a_round_of_nobody_or_of_failures_is_noise_alone() -> None:
    silent = {f"c{name}": Bad(name, answer=lambda tensors: None) for name in NAMES}
    for grid, rate in [(FakeGrid(nodes()), 1e-9), (FakeGrid(nodes(**silent)), 1.0)]:
        seen = run(grid=grid, privacy=private(rate=rate), min_clients=3, deadline=0.05)
        assert seen.last.state.adapter.digest() != START.digest()
        assert seen.last.reports == {}


def test_clients_do_not_decide_about_one_another() -> None:
    """One whose companions are absurd beside the others' is clipped, and not refused."""

    def answer(tensors: Any) -> Any:
        whole = {name: 1e3 * tensor for name, tensor in tensors.items()}
        return Reply(to_arrays(whole), 10.0, {}).encode()

    grid = FakeGrid(nodes(c0=Bad("0", answer=answer)))
    plain = private(noise_multiplier=1e-9)
    big = run(grid=grid, privacy=plain).last
    fine = run(privacy=plain).last
    moved = [
        (big.state.adapter.tensors()[name] - tensor).double().square().sum()
        for name, tensor in fine.state.adapter.tensors().items()
    ]
    # both clipped to 0.5, over q N = 4
    assert 0.0 < math.sqrt(float(torch.stack(moved).sum())) <= 2 * 0.5 / 4 * (1.0 + 1e-5)


def test_metrics_are_kept_back_but_in_a_study() -> None:
    for study in (False, True):
        how = private(study=study)
        strategy = AdapterStrategy(privacy=how, deadline=0.3, evaluate_every=0)
        result = strategy.start(FakeGrid(nodes()), to_arrays(START.tensors()), num_rounds=1)
        assert bool(result.train_metrics_clientapp) == study
    outcome = run(privacy=private()).last
    assert outcome.bias is None and outcome.signal == {}
    assert set(run(privacy=private(study=True)).last.signal) == set(START.layers)


def test_adaptive_clips_outlive_a_resume() -> None:
    how = private(adaptive=True)
    whole = run(rounds=3, privacy=how)
    part = run(rounds=2, privacy=how)
    assert part.last.state.clips != (0.5,)
    assert run(rounds=3, privacy=how, resume=part.last.state).last.state.clips == (
        whole.last.state.clips
    )


# Which rules


def check(name: str, mode: str, **settings: Any) -> None:
    own = {"train.optimizer": "sgd", "train.grad-clip": 0.0} if name == "scaffold" else {}
    settings = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    config = Config().with_overrides(
        {"strategy.name": name, "privacy.mode": mode, "privacy.noise-multiplier": 1.0}
        | own
        | settings
    )
    check_rule(build_rule(name, config.strategy.options), config)


def refused(mode: str) -> set[str]:
    found = set()
    for name in rule_names():
        try:
            check(name, mode)
        except ConfigError:
            found.add(name)
    return found


def test_which_rules_run_under_which_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are enough for privacy by client; clients' own noise covers whatever comes after."""
    monkeypatch.setattr(fitness, "able", lambda capability: "others")  # it takes its time
    per_client = {name for name in rule_names() if not rule_class(name).capabilities.sum_only}
    assert refused("client") == per_client | {"fedsa-lora", "scaffold"}
    assert refused("local") == {"fedsa-lora", "scaffold", "hetlora"}
    able = {name for name in rule_names() if rule_class(name).capabilities.client_privacy}
    assert able == set(rule_names()) - refused("client")


@pytest.mark.parametrize(
    ("name", "mode", "settings", "message", "remedy"),
    [
        ("krum", "client", {}, "every client's own factors", 'to "example" or "local"'),
        ("krum", "client", {}, "every client's own factors", "Use one of fed-sb, fedadagrad"),
        ("lora-fair", "client", {"strategy__objective": "cosine"}, "own factors", "Use one of"),
        ("fedsa-lora", "client", {}, "their own parts", "Use one of"),
        ("scaffold", "client", {}, "adds up over rounds", "Use one of"),
        ("hetlora", "local", {}, "choose its rank", "fedavg or flexlora"),
        ("fedavg", "client", {"federation__fraction": 0.5}, "each client by itself", "poisson"),
        ("fedavg", "client", {"federation__ranks": [8, 8, 8, 8, 4, 4]}, "who was sampled", "Leave"),
    ],
)
def test_refusals_name_what_works(
    name: str, mode: str, settings: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(name, mode, **settings)
    assert remedy in caught.value.remedy


def test_a_strategy_by_itself_refuses_too() -> None:
    with pytest.raises(ConfigError, match="own factors"):
        AdapterStrategy("flexlora", privacy=private())
    with pytest.raises(ConfigError, match="who was sampled"):
        AdapterStrategy("fedavg", privacy=private(), ranks=[2, 1])
    check("fedavg", "client", federation__fraction=0.5, federation__sampling="poisson")
