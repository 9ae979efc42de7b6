"""Clients of different ranks: cuts, padding, scalings, and who gets which rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer, Tensors
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fitness import check_rule
from strategies.ranks import RankScaling, assigned, by_rank, by_root, cut_adapter, padded
from strategies.registry import build_rule
from strategies.strategy import AdapterStrategy

FEDAVG = build_rule("fedavg")


def adapter(r: int, scaling: float) -> Adapter:
    rng = np.random.default_rng(0)
    return federation(rng, d_out=6, d_in=5, r=r, weights=[1.0]).with_scaling(scaling).current


@settings(deadline=None)
@given(st.integers(1, 4), st.sampled_from([by_rank, by_root]))
def test_a_cut_is_the_product_of_the_first_ranks_whatever_the_scaling(
    own: int, scaling: RankScaling
) -> None:
    whole = adapter(4, 2.0)
    part = cut_adapter(whole, own, FEDAVG.cut, scaling).layers[LAYER]
    layer = whole.layers[LAYER]
    expected = 2.0 * layer.B[:, :own] @ layer.A[:own]
    torch.testing.assert_close(part.product(), expected)
    assert part.A.shape == (own, 5) and part.B.shape == (6, own)
    assert part.scaling == pytest.approx(
        2.0 * 4 / own if scaling is by_rank else 2.0 * (4 / own) ** 0.5
    )


@settings(deadline=None)
@given(st.integers(1, 4))
def test_padding_what_was_cut_gives_the_same_product(own: int) -> None:
    whole = adapter(4, 2.0)
    part = cut_adapter(whole, own, FEDAVG.cut, by_rank)
    back = padded(part.tensors(), whole, by_rank)
    made = whole.with_tensors(back).layers[LAYER]
    assert made.A.shape == (4, 5) and made.B.shape == (6, 4)
    torch.testing.assert_close(made.product(), part.layers[LAYER].product())
    assert torch.equal(back["classifier.weight"], whole.extras["classifier.weight"])


def test_scaling_by_hand() -> None:
    """alpha = 16: 2 at rank 8, 4 at rank 4; a rank-4 client's B counts twice."""
    whole = adapter(8, 2.0)
    part = cut_adapter(whole, 4, FEDAVG.cut, by_rank).layers[LAYER]
    assert part.scaling == 4.0
    assert torch.equal(part.B, whole.layers[LAYER].B[:, :4] / 2)
    sent = {f"{LAYER}.lora_B.weight": part.B}
    assert torch.equal(padded(sent, whole, by_rank)[f"{LAYER}.lora_B.weight"][:, :4], 2 * part.B)


def test_ranks_go_to_clients_in_the_order_of_names() -> None:
    memory = {"0": 0, "1": 0, "10": 0}
    assert assigned([8, 4, 2], 8, memory) == {"0": 8, "1": 4, "10": 2}
    assert assigned(None, 8, memory) == {}


def test_by_memory_halves_until_it_fits() -> None:
    gib = 1 << 30
    memory = {"a": 64 * gib, "b": 63 * gib, "c": 32 * gib, "d": 10 * gib, "e": 0, "f": gib // 4}
    ranks = assigned("by-memory", 16, memory)
    assert ranks == {"a": 16, "b": 16, "c": 8, "d": 2, "e": 1, "f": 1}  # e does not say
    assert assigned("by-memory", 16, {"a": 0, "b": 0}) == {"a": 16, "b": 16}


@pytest.mark.parametrize(
    ("chosen", "said", "remedy"),
    [
        ({"federation.ranks": [8, 4]}, "names 2 ranks for 3 clients", "one rank for each"),
        ({"federation.ranks": [8, 4, 9]}, "holds 9, and adapter.rank is 8", "adapter.rank"),
        (
            {"federation.ranks": [8, 4, 2], "strategy.name": "lora-fair"},
            "lora-fair needs all clients to have one rank",
            "flexlora",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    chosen: dict[str, object], said: str, remedy: str
) -> None:
    config = Config().with_overrides({"federation.clients": 3, **chosen})
    rule = build_rule(config.strategy.name, config.strategy.options)
    with pytest.raises(ConfigError) as caught:
        check_rule(rule, config)
    assert said in caught.value.message and remedy in caught.value.remedy


def test_layers_of_the_clients_rank_or_less_are_left_as_they_are() -> None:
    whole = adapter(2, 2.0)
    assert cut_adapter(whole, 3, FEDAVG.cut, by_rank).layers[LAYER] is whole.layers[LAYER]
    assert replace(whole, residual={}).digest() == whole.digest()


@pytest.mark.parametrize(
    ("settings", "said", "remedy"),
    [
        (
            {"strategy.name": "fedex-lora", "strategy.server-optimizer": "adam"},
            "fedex-lora takes no server optimiser",
            "fedavg",
        ),
        ({"strategy.name": "fedprox"}, "no rule of its own", "train.proximal-mu"),
        (
            {"strategy.name": "lora-a2", "train.optimizer-state": "keep"},
            "under lora-a2 factors and ranks take turns",
            "fedavg",
        ),
        (
            {"strategy.name": "fedrot-lora", "train.optimizer-state": "keep"},
            "under fedrot-lora factors are turned",
            "fedavg",
        ),
        (
            {"strategy.name": "multi-krum", "strategy.selected": 10, "federation.clients": 10},
            "7 count as honest (strategy.byzantine is 3 when unset)",
            "Set strategy.selected to 7 or less",
        ),
        ({"strategy.name": "hetlora", "strategy.min-rank": 9}, "no client would ever", "gamma=1"),
        ({"strategy.name": "fed-sb", "federation.rounds": 1}, "nothing would be trained", "2 or"),
    ],
)
def test_what_rules_cannot_honour_is_refused(
    settings: dict[str, object], said: str, remedy: str
) -> None:
    config = Config().with_overrides(settings)
    with pytest.raises(ConfigError) as caught:
        check_rule(build_rule(config.strategy.name, config.strategy.options), config)
    assert said in caught.value.message and remedy in caught.value.remedy


def test_a_word_that_is_no_way_to_choose_ranks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'by-mem', and may be a list like \[8, 4, 2\] or"):
        Config().with_overrides({"federation.ranks": "by-mem"})


def test_the_strategy_refuses_mixed_ranks_as_a_config_does() -> None:
    with pytest.raises(ConfigError, match="ranks is set, and lora-fair needs all"):
        AdapterStrategy("lora-fair", ranks=[2, 1])


def test_ranks_that_no_client_of_a_round_has_stay() -> None:
    """By hand: rank 2 is trained by one of two clients, and by none. Equal weights."""
    current = Adapter({LAYER: LoraLayer(torch.ones(2, 1), torch.ones(1, 2))})

    def sent(value: float, rank: int) -> Tensors:
        return {
            f"{LAYER}.lora_A.weight": torch.full((rank, 1), value),
            f"{LAYER}.lora_B.weight": torch.full((1, rank), value),
        }

    def aggregated(name: str, *ranks: int) -> tuple[list[float], list[float]]:
        updates = {
            str(k): (1.0, padded(sent(4.0, rank), current, lambda *_: 1.0))
            for k, rank in enumerate(ranks)
        }
        fed = Federation(current, updates, {str(k): rank for k, rank in enumerate(ranks)})
        layer = fed.aggregate(name).adapter.layers[LAYER]
        return layer.A[:, 0].tolist(), layer.B[0].tolist()

    assert aggregated("fedavg", 2, 1) == ([4.0, 2.0], [4.0, 2.0])
    assert aggregated("fedavg", 1, 1) == ([4.0, 1.0], [4.0, 1.0])
    assert aggregated("hetlora", 1, 1) == ([4.0, 1.0], [4.0, 1.0])
