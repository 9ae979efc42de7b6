"""The strategy on a Grid in memory: order of arrival, sampling, traffic, resuming, Flower."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_grid import (
    A0,
    ARRAYS,
    NAMES,
    START,
    Answer,
    Bad,
    Client,
    FakeGrid,
    Seen,
    nodes,
    run,
    small_adapter,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedgraft.adapter import Tensors, from_arrays
from fedgraft.errors import RunError
from fedgraft.messages import Reply
from simulations.in_process import InProcessGrid
from strategies.fedavg import MEANS
from strategies.rule import Capabilities, LayerContext, LayerResult, Phase, SumOnlyRule
from strategies.sampling import Sampling, sample_size, secretly_sampled
from strategies.strategy import AdapterStrategy

# Order and names


def test_the_order_of_arrival_changes_nothing():
    def told(shuffle: int) -> list[Any]:
        seen = run("lora-fair", grid=FakeGrid(nodes(), shuffle), rounds=3, fraction=0.75)
        return [
            (
                o.state.adapter.digest(),
                o.sampled,
                list(o.reports.items()),
                list(o.validation.items()),
                o.bias,
            )
            for o in seen.outcomes
        ]

    first = told(0)
    for shuffle in range(1, 6):
        assert told(shuffle) == first


def test_averaged_metrics_do_not_depend_on_the_order_of_arrival():
    weights = {f"c{name}": Client(name, weight=0.1 * 3**k) for k, name in enumerate(NAMES)}

    def mean(shuffle: int) -> float:
        strategy = AdapterStrategy(deadline=0.3)
        result = strategy.start(FakeGrid(nodes(**weights), shuffle), ARRAYS, num_rounds=1)
        return float(result.evaluate_metrics_clientapp[1]["accuracy"]) + float(
            result.train_metrics_clientapp[1]["loss"]
        )

    assert len({mean(shuffle) for shuffle in range(12)}) == 1


def test_node_ids_change_nothing():
    def told(grid: FakeGrid) -> list[Any]:
        seen = run(grid=grid, rounds=4, fraction=0.5, seed=3)
        return [(o.state.adapter.digest(), o.sampled) for o in seen.outcomes]

    other = dict(
        zip((7, 3, 99, 1), (Client(n, 10.0 + k) for k, n in enumerate(NAMES)), strict=True)
    )
    assert told(FakeGrid(nodes())) == told(FakeGrid(other))


def test_sampling_follows_names_seed_and_round():
    def sampled(names: tuple[str, ...] = NAMES, **options: Any) -> list[list[str]]:
        seen = run(grid=FakeGrid(nodes(names)), rounds=8, fraction=0.5, **options)
        return [outcome.sampled for outcome in seen.outcomes[1:]]

    first = sampled()
    assert all(len(set(names)) == 2 for names in first) and len({tuple(n) for n in first}) > 2
    assert sampled() == first and sampled(seed=1) != first
    # Frozen: what a resumed run and another machine sample too.
    assert first[:4] == FROZEN_SAMPLES
    letters = sampled(("a", "b", "c", "d"))
    assert [["abcd"[int(n)] for n in names] for names in first] == letters


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_secret_samples_follow_nothing_and_miss_nobody(sampling: Sampling):
    names = [str(n) for n in range(40)]
    drawn = [secretly_sampled(names, 0.5, sampling) for _ in range(60)]
    assert len({tuple(found) for found in drawn}) == 60
    assert all(found == sorted(found, key=int) for found in drawn)
    sizes = {len(found) for found in drawn}
    assert sizes == {20} if sampling == "fixed" else len(sizes) > 1
    # 30 of 60 on average; ten standard deviations off has a chance of 1e-22
    assert all(0 < sum(name in found for found in drawn) < 60 for name in names)
    seen = [run(rounds=8, fraction=0.5, secret=True, sampling=sampling) for _ in range(2)]
    first, second = ([o.sampled for o in found.outcomes] for found in seen)
    assert first != second


FROZEN_SAMPLES = [["1", "3"], ["0", "1"], ["2", "3"], ["0", "1"]]


@pytest.mark.parametrize(
    ("fraction", "clients", "size"),
    [(1.0, 6, 6), (0.5, 6, 3), (0.5, 5, 3), (0.1, 6, 1), (0.01, 6, 1), (0.25, 10, 3), (0.3, 10, 3)],
)
def test_sample_sizes(fraction: float, clients: int, size: int):
    assert sample_size(fraction, clients) == size


def test_only_sampled_clients_train_and_all_evaluate():
    own = {f"c{name}": Client(name) for name in NAMES}
    seen = run(grid=FakeGrid(nodes(**own)), fraction=0.5, rounds=3)
    for outcome in seen.outcomes[1:]:
        asked = {c.name for c in own.values() if outcome.state.round in {r.round for r in c.heard}}
        assert asked == set(outcome.sampled) == set(outcome.reports)
        assert list(outcome.validation) == list(NAMES)


# What a round tells


def test_the_mean_of_a_round_by_hand():
    class Fixed(Client):
        def trained(self, request: Any) -> Tensors:
            return {n: torch.full_like(t, float(self.name)) for n, t in request.tensors().items()}

    grid = FakeGrid({5: Fixed("1", weight=30.0), 6: Fixed("5", weight=10.0)})
    made = run(grid=grid).last.state.adapter
    assert {float(v) for t in made.tensors().values() for v in t.flatten()} == {2.0}


def test_bytes_are_those_of_the_arrays():
    outcome = run(rounds=1).last
    # 2 layers of A (2, 4) and B (4, 2), a head (3, 4), each with numpy's header of 128 bytes.
    size = 4 * (128 + 4 * 8) + (128 + 4 * 12)
    assert (outcome.bytes_down, outcome.bytes_up) == (4 * size, 4 * size)
    assert run(fraction=0.5).last.bytes_down == 2 * size
    silent = FakeGrid(nodes(c1=Bad("1")))
    assert run(grid=silent).last.bytes_up == 3 * size


def test_ffa_lora_sends_exactly_half_for_square_layers():
    square = small_adapter(d=16, r=4, extras=False)

    def traffic(rule: str, derive: bool) -> tuple[int, int]:
        clients = {f"c{n}": Client(n, whole=square) for n in NAMES}
        outcome = run(
            rule, grid=FakeGrid(nodes(**clients)), start=square, derive_A=derive, rounds=2
        ).last
        return outcome.bytes_down, outcome.bytes_up

    both, half = traffic("fedavg", True), traffic("ffa-lora", True)
    assert both == (4 * 4 * (128 + 4 * 64),) * 2
    assert half == (both[0] // 2, both[1] // 2) and both[0] % 2 == 0
    # With clients that cannot derive A it has to travel down, and never up.
    assert traffic("ffa-lora", False) == (both[0], both[1] // 2)


def test_under_ffa_lora_a_is_neither_sent_nor_changed_and_its_hash_is():
    own = Client("0", whole=START)
    seen = run("ffa-lora", grid=FakeGrid({1: own}), derive_A=True, rounds=2)
    for request in own.heard:
        assert request.train == "B" and len(request.a_hash) == 64
        assert not any("lora_A" in name for name in request.arrays)
    for name, layer in seen.last.state.adapter.layers.items():
        assert torch.equal(layer.A, START.layers[name].A)
        assert not torch.equal(layer.B, START.layers[name].B)
    assert seen.last.bias is not None and seen.last.bias.before == pytest.approx(0.0, abs=1e-6)


def test_a_request_carries_what_the_client_needs():
    own = Client("0")
    grid = FakeGrid({1: own})
    strategy = AdapterStrategy(
        lineage="run-1", base_hash="b4se", hooks=Seen(durable=4), deadline=0.3
    )
    strategy.start(grid, ARRAYS, num_rounds=1, train_config=ConfigRecord({"lr": 0.5}))
    (request,) = own.heard
    assert (request.round, request.train, request.a_hash) == (1, "AB", "")
    assert (request.lineage, request.base_hash, request.durable_round) == ("run-1", "b4se", 4)
    (sent,) = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert sent.content.config_records["config"]["lr"] == 0.5


def test_evaluation_every_few_rounds_and_at_the_end():
    def evaluated(every: int) -> list[int]:
        seen = run(rounds=5, evaluate_every=every)
        return [o.state.round for o in seen.outcomes if o.validation]

    assert evaluated(1) == [0, 1, 2, 3, 4, 5]
    assert evaluated(2) == [0, 2, 4, 5]
    assert evaluated(0) == []


@pytest.mark.parametrize(
    "answer",
    [
        Error(1, "no"),
        Reply(refusal="private").encode(),
        Reply(weight=-1e6, metrics={"accuracy": 9.0}).encode(),
        Reply(weight=math.nan, metrics={"accuracy": 9.0}).encode(),
        RecordDict(),
        None,
    ],
)
def test_a_bad_evaluation_is_left_out(answer: Answer):
    honest = Client("1")

    def node(message: Message) -> Answer:
        return answer if message.metadata.message_type == "evaluate" else honest(message)

    grid = FakeGrid(nodes(c1=node))
    strategy = AdapterStrategy(deadline=0.3)
    result = strategy.start(grid, ARRAYS, num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.1)


def test_the_hooks_may_stop_the_run():
    seen = run(rounds=9, hooks=Seen(stop_after=2))
    assert [o.state.round for o in seen.outcomes] == [0, 1, 2]
    assert seen.descriptions == {name: f"data of {name}" for name in NAMES}


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(rounds=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError):
        run(grid=FakeGrid(nodes(c0=Bad("0"))), min_clients=4)
    assert list(tmp_path.iterdir()) == []


# Resuming


class Counting(SumOnlyRule):
    """FedAvg whose B is pulled towards a running mean that it keeps as its state."""

    name, title, citation = "counting", "Counting", "none"
    capabilities = Capabilities(sum_only=True)

    def phases(self, round: int) -> tuple[Phase, ...]:
        return (MEANS,)

    def conclude(self, context: LayerContext) -> LayerResult:
        B = context.shared["B"]
        old = context.state.get("mean", torch.zeros_like(B))
        mean = 0.9 * old + 0.1 * B
        factors = context.current.with_factors({"A": context.shared["A"], "B": B - mean})
        return LayerResult(factors, {"mean": mean})


COUNTING = Counting()


@pytest.mark.parametrize(
    "rule", ["fedavg", "ffa-lora", "lora-fair", pytest.param(COUNTING, id="counting")]
)
def test_a_resumed_run_goes_on_to_the_bit(rule: Any):
    whole = run(rule, rounds=6, fraction=0.5, seed=2)
    half = run(rule, rounds=3, fraction=0.5, seed=2)
    state = half.last.state
    rest = run(rule, rounds=6, fraction=0.5, seed=2, resume=state)

    def told(seen: Seen) -> list[Any]:
        return [(o.state.round, o.sampled, o.state.adapter.digest()) for o in seen.outcomes]

    assert told(rest)[1:] == told(whole)[4:]
    assert rest.outcomes[0].state is state
    kept = whole.last.state.rule
    assert set(kept) == ({f"{n}::mean" for n in START.layers} if rule == COUNTING else set())
    assert all(torch.equal(rest.last.state.rule[n], t) for n, t in kept.items())


def test_a_run_that_has_all_its_rounds_trains_no_more():
    done = run(rounds=2).last.state
    seen = run(rounds=2, resume=done)
    assert len(seen.outcomes) == 1 and seen.last.state is done


# Flower's own loop, and other people's apps


def test_flowers_own_loop_gives_the_same():
    ours = AdapterStrategy("lora-fair", scaling=2.0, fraction=0.5, seed=1)
    central: list[int] = []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        central.append(round)
        return MetricRecord({"entry": float(from_arrays(arrays)[A0][0, 0])})

    one = ours.start(FakeGrid(nodes()), ARRAYS, num_rounds=3, timeout=5, evaluate_fn=evaluate)
    theirs = AdapterStrategy("lora-fair", scaling=2.0, fraction=0.5, seed=1)
    other = Strategy.start(
        theirs, FakeGrid(nodes()), ARRAYS, num_rounds=3, timeout=5, evaluate_fn=evaluate
    )
    assert central == [0, 1, 2, 3] * 2
    made, again = from_arrays(one.arrays), from_arrays(other.arrays)
    assert list(made) == list(again) and all(torch.equal(made[n], again[n]) for n in made)
    assert one.train_metrics_clientapp == other.train_metrics_clientapp
    assert one.evaluate_metrics_serverapp == other.evaluate_metrics_serverapp
    # Our loop also asks the clients before the first round.
    later = {r: m for r, m in one.evaluate_metrics_clientapp.items() if r > 0}
    assert later == other.evaluate_metrics_clientapp


foreign = ClientApp()


def foreign_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], modules_to_save=["2"])
        return get_peft_model(net, config)


@foreign.train()
def foreign_train(message: Message, context: Context) -> Message:
    """What anybody's ClientApp with PEFT looks like; it has never heard of FedGraft."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = foreign_model()
    arrays = message.content["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(3, 4) * context.node_config["partition-id"]).square().sum().backward()
    optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": 3, "train_loss": 0.5}),
        }
    )
    return Message(content, reply_to=message)


@pytest.mark.parametrize("rule", ["fedavg", "lora-fair"])
def test_somebody_elses_app_is_served_in_three_lines(rule: str):
    from peft import get_peft_model_state_dict

    grid = InProcessGrid(foreign, 3, {})
    strategy = AdapterStrategy(rule)
    initial = ArrayRecord(get_peft_model_state_dict(foreign_model()))
    result = strategy.start(grid, initial, num_rounds=2, timeout=10)
    assert list(result.arrays) == sorted(initial, key=lambda name: (name.split(".")[2], name))
    made = from_arrays(result.arrays)
    assert any(not torch.equal(made[n], t) for n, t in from_arrays(initial).items() if "_B" in n)
    assert result.train_metrics_clientapp[2] == {"train_loss": 0.5}
    # They answer no hello and no evaluation: node ids serve as names, and nothing is reported.
    assert strategy.roster.names() == [str(node) for node in grid.get_node_ids()]
    assert not result.evaluate_metrics_clientapp
