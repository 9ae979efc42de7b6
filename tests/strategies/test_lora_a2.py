"""LoRA-A2: scores, selection over all modules, and turns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import HEAD, Server, world

from fedgraft.adapter import factor_name
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.aggregation import aggregate
from strategies.lora_a2 import rank_scores
from strategies.ranks import by_rank, cut_adapter
from strategies.registry import build_rule
from strategies.spool import UpdateSpool
from strategies.validation import Intake

LAYER = "model.layers.0.q_proj"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), moving=st.sampled_from("AB"), r=st.integers(1, 4))
def test_scores_are_norms_of_each_ranks_part_of_the_change(seed: int, moving: str, r: int) -> None:
    rng = np.random.default_rng(seed)
    A, B, A1, B1 = (rng.standard_normal(shape) for shape in [(r, 6), (5, r)] * 2)
    start = {factor_name(LAYER, "A"): torch.from_numpy(A)}
    start[factor_name(LAYER, "B")] = torch.from_numpy(B)
    moved = {factor_name(LAYER, moving): torch.from_numpy(A1 if moving == "A" else B1)}
    scores = rank_scores(moving, start, moved, LAYER)
    for i in range(r):
        if moving == "B":
            part = np.outer(B1[:, i] - B[:, i], A[i])
        else:
            part = np.outer(B[:, i], A1[i] - A[i])
        assert float(scores[i]) == pytest.approx(np.linalg.norm(part))


def test_factors_take_turns_B_first() -> None:
    rule = build_rule("lora-a2")
    assert [rule.plan(round).train for round in (1, 2, 3)] == [{"B"}, {"A"}, {"B"}]
    assert rule.plan(1).send == rule.plan(2).send == {"A", "B"} and rule.plan(1).sparse


@pytest.mark.parametrize("rounds", [1, 2])
def test_one_scoring_epoch_then_masked_training_from_the_start(rounds: int) -> None:
    adapter, clients = world(layers=3, r=4)
    rule = build_rule("lora-a2", {"budget": 1.0, "scoring-epochs": 2.0, "lr-ratio": 3.0})
    host = Server(rule, adapter)
    for _ in range(rounds):
        for client in clients.values():
            client.calls.clear()
        host.step(clients)
    moving = "B" if rounds == 1 else "A"
    for name, client in clients.items():
        (first, scoring), (second, training) = client.calls
        start = host.held[name]
        assert first is start and second is start  # what was scored is thrown away
        assert scoring.epochs == 2.0 and training.epochs is None
        assert not scoring.masks
        for how in (scoring, training):
            assert how.factors == {moving} and how.extras and how.rates == {"B": 3.0}
        # three ranks over all three modules together, those of the highest scores
        again = client.train(start, scoring).tensors
        flat = torch.cat([rank_scores(moving, start, again, layer) for layer in adapter.layers])
        best = set(flat.argsort(descending=True)[:3].tolist())
        chosen = set()
        for index, layer in enumerate(adapter.layers):
            tensor = factor_name(layer, moving)
            mask, axis = training.masks[tensor], 0 if moving == "A" else 1
            assert mask.shape == start[tensor].shape
            change = host.updates[name].tensors[tensor] - start[tensor]
            for rank in range(4):
                row = mask.select(axis, rank)
                assert bool(row.all()) or not bool(row.any())
                assert bool(change.select(axis, rank).any()) == bool(row.all())
                if bool(row.all()):
                    chosen.add(4 * index + rank)
        assert chosen == best
        assert not torch.equal(host.updates[name].tensors[HEAD], start[HEAD])


def test_clients_of_different_data_choose_differently() -> None:
    adapter, clients = world(layers=3, r=4)
    rule = build_rule("lora-a2", {"budget": 1.0})
    Server(rule, adapter).step(clients)
    masks = [
        torch.cat([m.flatten() for m in client.calls[1][1].masks.values()])
        for client in clients.values()
    ]
    assert not all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_the_server_adds_the_mean_change_exactly() -> None:
    """Over four rounds: the product is the mean of the clients' products, and both factors move."""
    adapter, clients = world(layers=2, r=3)
    host = Server(build_rule("lora-a2", {"budget": 1.0}), adapter)
    for _ in range(4):
        held = host.adapter.layers
        host.step(clients)
        for layer, made in host.adapter.layers.items():
            mean = np.zeros((5, 6))
            for k in range(3):
                sent = host.updates[str(k)].tensors
                A = sent.get(factor_name(layer, "A"), held[layer].A).double().numpy()
                B = sent.get(factor_name(layer, "B"), held[layer].B).double().numpy()
                mean += (k + 1) / 6 * B @ A
            product = made.B.double().numpy() @ made.A.double().numpy()
            np.testing.assert_allclose(product, mean, atol=1e-6)
    first = adapter.layers
    assert any(not torch.equal(made.A, first[n].A) for n, made in host.adapter.layers.items())
    assert any(made.B.any() for made in host.adapter.layers.values())


def test_a_budget_of_the_whole_pool_masks_nothing() -> None:
    adapter, clients = world(r=2)
    Server(build_rule("lora-a2", {"budget": 2.0}), adapter).step(clients)
    assert all(bool(mask.all()) for mask in clients["0"].calls[1][1].masks.values())


def test_a_budget_above_the_pool_is_refused() -> None:
    config = Config.load(settings=["adapter.rank=4", "strategy.name=lora-a2"])
    build_rule("lora-a2", {"budget": 4.0}).check(config)
    with pytest.raises(ConfigError, match=r"budget is 5.*adapter\.rank = 4") as caught:
        build_rule("lora-a2", {"budget": 5.0}).check(config)
    assert "rolora" in caught.value.remedy


@pytest.mark.parametrize("round", [1, 2])
def test_clients_of_smaller_ranks_change_the_product_by_their_own_change(
    round: int, tmp_path: Path
) -> None:
    """A pool of 3 ranks, clients that hold 1, 2 and 3 of them: nothing of the rest is averaged."""
    rng = np.random.default_rng(5)
    adapter, clients = world(layers=1, r=3)
    B = torch.from_numpy(rng.standard_normal((5, 3))).float()
    adapter = adapter.with_tensors({factor_name(LAYER, "B"): B})
    rule = build_rule("lora-a2", {"budget": 1.0})
    ranks = {"0": 1, "1": 2}
    names = frozenset(adapter.tensors(rule.plan(round).train))
    intake = Intake(adapter, names, 1e9, {}, ranks, by_rank, differences=True)
    spool, expected = UpdateSpool(tmp_path), adapter.layers[LAYER].product().double()
    for k, client in clients.items():
        rank = ranks.get(k, 3)
        cut = cut_adapter(adapter, rank, rule.cut, by_rank)
        client.scaling = cut.layers[LAYER].scaling
        start = cut.tensors()
        sent = rule.local(client.work(rule, round, start, {})).tensors
        after = cut.with_tensors(sent).layers[LAYER].product() - cut.layers[LAYER].product()
        expected = expected + client.weight / 6 * after.double()
        difference = {name: tensor - start[name] for name, tensor in sent.items()}
        assert intake.check(k, difference, {}, client.weight) == ranks.get(k)
        spool.add(k, client.weight, intake.in_server_terms(difference, ranks.get(k)))
    made = aggregate(rule, spool, adapter, {}, round).adapter.layers[LAYER]
    torch.testing.assert_close(made.product().double(), expected, rtol=0, atol=1e-5)
