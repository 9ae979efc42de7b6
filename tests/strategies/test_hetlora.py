"""HetLoRA: weights by norms of whole updates, the penalty on the last ranks, and their pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, federation, numpy_of, of_ranks, two_clients
from torch import Tensor

from fedgraft.adapter import Adapter, Tensors
from strategies.hetlora import HetLoRA, HetLoRAOptions, tail_norm
from strategies.local import A_AND_B, LocalUpdate, LocalWork, Trained, Training
from strategies.rule import Weighing

A0, B0 = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
HEAD = "classifier.weight"


# The server


def test_weights_by_hand() -> None:
    """Norms of B A are 2 and 4, whatever the weights of 10 and 30 say: shares 1/3 and 2/3."""
    layer = two_clients().aggregate("hetlora").adapter.layers[LAYER]
    torch.testing.assert_close(layer.A, torch.tensor([[1 / 3, 2 / 3]]))
    torch.testing.assert_close(layer.B, torch.tensor([[2 / 3], [8 / 3]]))


def test_norms_are_of_all_layers_with_their_scalings_and_weigh_extras_too() -> None:
    fed = federation(np.random.default_rng(0), d_out=5, d_in=6, r=2, weights=[9.0, 1.0], layers=3)
    layers = {
        name: replace(layer, scaling=scaling)
        for (name, layer), scaling in zip(fed.current.layers.items(), (0.1, 1.0, 30.0), strict=True)
    }
    fed = replace(fed, current=Adapter(layers, fed.current.extras))
    squares = np.zeros(2)
    for name, layer in layers.items():
        products = [layer.scaling * c.B @ c.A for c in fed.clients(name)]
        squares += [np.linalg.norm(product) ** 2 for product in products]
    shares = np.sqrt(squares) / np.sqrt(squares).sum()
    made = fed.aggregate("hetlora").adapter
    values = [tensors[HEAD].double() for _, tensors in fed.updates.values()]
    head = sum(share * value for share, value in zip(shares, values, strict=True))
    torch.testing.assert_close(made.extras[HEAD], head.float())
    for name in layers:
        clients = [
            dense.Client(c.A, c.B, share)
            for c, share in zip(fed.clients(name), shares, strict=True)
        ]
        for made_, expected in zip(numpy_of(made.layers[name]), dense.means(clients), strict=True):
            np.testing.assert_allclose(made_, expected, rtol=1e-5, atol=1e-6)


def test_smaller_ranks_are_padded_and_their_own_scaling_counts() -> None:
    fed = federation(np.random.default_rng(1), d_out=5, d_in=6, r=4, weights=[1.0, 1.0])
    fed, clients = of_ranks(fed, [1, 4])
    norms = [float(np.linalg.norm(c.B @ c.A)) for c in clients]
    layer = fed.aggregate("hetlora").adapter.layers[LAYER]
    A, B = numpy_of(layer)
    small, large = (norm / sum(norms) for norm in norms)
    np.testing.assert_allclose(A[1:], large * clients[1].A[1:], rtol=1e-5)
    np.testing.assert_allclose(A[:1], small * clients[0].A + large * clients[1].A[:1], rtol=1e-5)
    scaled = layer.scaling * B[:, :1]
    np.testing.assert_allclose(
        scaled, small * clients[0].B + large * clients[1].B[:, :1], rtol=1e-5, atol=1e-6
    )


def test_when_nobody_has_learned_anything_examples_weigh() -> None:
    fed = two_clients()
    zero = {c: (w, t | {B0: torch.zeros(2, 1)}) for c, (w, t) in fed.updates.items()}
    made = replace(fed, updates=zero).aggregate("hetlora")
    assert made.adapter.layers[LAYER].A.tolist() == [[0.25, 0.75]]
    assert made.notes == ("all updates are zero: weighted by examples",)
    assert HetLoRA().weigh(torch.tensor([9.0, 1.0]).double(), [0.5, 0.5]) == Weighing((0.75, 0.25))


# The client


def start(rank: int) -> Tensors:
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    return {A0: normal(rank, 6), B0: normal(5, rank), HEAD: normal(3, 6)}


def play(
    tensors: Tensors, becomes: Callable[[Tensors], Tensors], **options: float
) -> tuple[LocalUpdate, Training]:
    """Run the client's half with training that makes of the adapter what it is told; alpha = 8."""
    asked: list[Training] = []

    def train(begin: Tensors, how: Training) -> Trained:
        asked.append(how)
        return Trained(becomes(begin))

    rank = len(tensors[A0])
    work = LocalWork(
        round=3,
        seed=0,
        client="0",
        start=tensors,
        scalings={LAYER: 8.0 / rank},
        scaling_at=lambda r: 8.0 / r,
        companions={},
        kept={},
        plan_factors=A_AND_B,
        plan_extras=True,
        train=train,
        sketch=lambda probes: {},
    )
    known = {key.rstrip("_"): value for key, value in options.items()}
    rule = HetLoRA(HetLoRAOptions.model_validate(known))
    update = rule.local(work)
    assert len(asked) == 1
    return update, asked[0]


def shrunk(tensors: Tensors, kept: int, factor: float) -> Tensors:
    """The first ranks trained somewhere else, the others multiplied."""
    made = {name: tensor + 0.5 for name, tensor in tensors.items()}
    made[A0][kept:] = tensors[A0][kept:] * factor
    made[B0][:, kept:] = tensors[B0][:, kept:]
    return made


@pytest.mark.parametrize(("gamma", "kept"), [(0.99, 7), (0.75, 6), (0.5, 4), (0.01, 1)])
def test_a_client_drops_the_ranks_that_have_shrunk(gamma: float, kept: int) -> None:
    begin = start(8)
    trained = shrunk(begin, kept, 0.9)
    update, how = play(begin, lambda _: trained, gamma=gamma)
    assert how.factors == A_AND_B and how.extras and how.penalty is not None
    sent = update.tensors
    assert torch.equal(sent[A0], trained[A0][:kept]) and torch.equal(sent[HEAD], trained[HEAD])
    # alpha / r of the new rank times the new product is what it was
    product = 8.0 / kept * sent[B0] @ sent[A0]
    expected = 8.0 / 8 * trained[B0][:, :kept] @ trained[A0][:kept]
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_client_keeps_ranks_that_have_not_shrunk(factor: float) -> None:
    begin = start(8)
    trained = shrunk(begin, 7, factor)
    assert play(begin, lambda _: trained)[0].tensors is trained


def test_in_the_first_round_nothing_can_have_shrunk() -> None:
    begin = start(4) | {B0: torch.zeros(5, 4)}
    trained = shrunk(begin, 3, 0.1) | {B0: torch.full((5, 4), 1e-6)}
    assert play(begin, lambda _: trained)[0].tensors is trained


@pytest.mark.parametrize(
    "options", [{"gamma": 1.0}, {"gamma": 0.5, "min-rank": 4}, {"gamma": 0.99, "min-rank": 9}]
)
def test_nothing_is_pruned_below_the_least_rank(options: Mapping[str, float]) -> None:
    begin = start(4)
    trained = shrunk(begin, 2, 0.0)
    update, how = play(begin, lambda _: trained, **options)
    assert update.tensors is trained and how.penalty is None
    assert play(start(1), lambda begin: begin)[1].penalty is None


def test_the_penalty_by_hand_and_on_padded_factors() -> None:
    """lambda (3 * 4 + 1 * 2) over two layers of tails A = 3 e1, B = 4 e2 and A = e1, B = 2 e2."""
    other = LAYER.replace("0", "1")
    tensors = {name: torch.zeros(t.shape) for name, t in start(2).items()}
    tensors |= {
        f"{other}.lora_{f}.weight": tensors[f"{LAYER}.lora_{f}.weight"].clone() for f in "AB"
    }
    tensors[A0][1, 0], tensors[B0][1, 1] = 3.0, 4.0
    tensors[f"{other}.lora_A.weight"][1, 0], tensors[f"{other}.lora_B.weight"][1, 1] = 1.0, 2.0
    tensors[A0][0], tensors[B0][:, 0] = 7.0, 7.0  # which is not in the tail
    assert float(tail_norm(tensors, 1)) == 14.0
    _, how = play({A0: tensors[A0], B0: tensors[B0], HEAD: tensors[HEAD]}, dict, lambda_=0.25)
    assert how.penalty is not None
    # in the model a smaller rank is padded with zeros, which feel no penalty
    A = torch.cat([tensors[A0], torch.zeros(2, 6)]).requires_grad_()
    B = torch.cat([tensors[B0], torch.zeros(5, 2)], dim=1).requires_grad_()
    loss = how.penalty({A0: A, B0: B})
    loss.backward()
    assert float(loss.detach()) == 0.25 * 12.0
    assert A.grad is not None and B.grad is not None
    assert A.grad[1, 0] == 0.25 * 4.0 and B.grad[1, 1] == 0.25 * 3.0
    assert int((A.grad != 0).sum()) == int((B.grad != 0).sum()) == 1
    # B = 0, as in the first round: no NaN, and no push
    zero = torch.zeros(5, 4, requires_grad=True)
    how.penalty({A0: A.detach(), B0: zero}).backward()
    assert zero.grad is not None and not zero.grad.any()


def test_the_host_may_take_pruned_ranks() -> None:
    assert HetLoRA.prunes and HetLoRA.capabilities.mixed_ranks
