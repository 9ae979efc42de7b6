"""Fed-SB: train an r x r matrix between two fixed factors, and send nothing else.

"Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning"
Raghav Singhal, Kaustubh Ponkshe, Rohit Vartak, Lav R. Varshney, Praneeth Vepakomma. 2025.
https://arxiv.org/abs/2502.15436

on the adapter and the initialisation of

"Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning" (LoRA-SB)
Kaustubh Ponkshe, Raghav Singhal, Eduard Gorbunov, Alexey Tumanov, Samuel Horvath, Praneeth
Vepakomma. 2024. https://arxiv.org/abs/2411.19557 (algorithm 1)

W = W0 + s B0 R A0 with B0 (d_out, r) and A0 (r, d_in) fixed, common to all, and R (r, r) trained:

    round 1      the first step that full fine-tuning would take, -eta G with G = sum p_k G_k the
                 gradient by W0, is approximated, U S V^T ~ G to rank r:
                 B0 = U,  A0 = V^T / s,  R = -eta S.
    from then on clients train R_k; Rbar = sum p_k R_k, and s B0 Rbar A0 is the exact mean.

In round 1 clients train nothing and send linear sketches of G_k (`strategies.sketched_svd`); the
server sees their sum, which is the sketch of G, and never a gradient. A0 and B0 travel once, after
that r^2 numbers a layer go up and down, whatever its width.

Differences from the papers:
- LoRA-SB approximates Adam's first step, -eta sgn(G). No linear sketch gives signs of a sum, and a
  server that sees sums only can't have them, so this is the step of SGD. The bases are then those
  of the gradient itself; R matters little, since it trains (there eta is the first learning rate of
  a warm-up, some 5e-6), and `strategy.initial-lr` sets it.
- The published code takes G from 170 examples pooled on one machine; here from all of every
  client's.
- LoRA-SB sets alpha = r, so that s = 1. Here A0 takes 1 / s, to the same effect whatever alpha is:
  the gradient by R is U^T G V, the best there is in this subspace, and nothing has to be scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors, factor_name, pad_rank, parse_factor
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fedavg import keep_mean
from strategies.local import (
    B_ONLY,
    Factors,
    LocalUpdate,
    LocalWork,
    Training,
    beside,
    of_layer,
    owner_of,
)
from strategies.options import RuleOptions
from strategies.refusals import refuse_init, refuse_lr_ratio
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    LayerUpdate,
    Phase,
    Plan,
    SumOnlyRule,
)
from strategies.sketched_svd import leading, probes, sketch_sizes

_NOTHING: Factors = frozenset()


class FedSBOptions(RuleOptions):
    """Options of Fed-SB.

    Attributes:
        initial_lr: eta of the step that R starts from; 0 starts from R = 0.
    """

    initial_lr: Annotated[float, Field(ge=0.0)] = 0.01


class FedSB(SumOnlyRule):
    """Find A0 and B0 from the federation's first gradient; then train and average R."""

    name = "fed-sb"
    title = "Fed-SB"
    citation = "Singhal et al., 2025, arXiv:2502.15436"
    capabilities = Capabilities(sum_only=True, exact=True, any_start=False, one_training=False)
    Options = FedSBOptions
    opens = True
    options: FedSBOptions

    def check(self, config: Config) -> None:
        """Refuse an adapter to start from, and a run that ends before anything is trained.

        Raises:
            ConfigError: adapter.from or adapter.init is set, and its factors would be replaced; or
                there is but one round, which finds A0 and B0; or train.lr-ratio is set.
        """
        refuse_init(config, self.name, "makes its own factors in round 1")
        refuse_lr_ratio(config, self.name, "trains neither A nor B")
        if config.federation.rounds < 2:
            raise ConfigError(
                "fed-sb finds its factors in round 1, and federation.rounds is 1: nothing would be "
                "trained",
                "Set federation.rounds to 2 or more.",
            )
        if config.adapter.from_ is not None:
            raise ConfigError(
                "fed-sb makes its own factors in round 1, and adapter.from names others",
                "Leave adapter.from out, or go on from it with fedavg.",
            )

    def plan(self, round: int) -> Plan:
        """Return that no factor comes up; those to look at the gradient with go down at first."""
        if round <= 1:
            return Plan(train=_NOTHING, send=B_ONLY, extras=False, derive_A=True)
        return Plan(train=_NOTHING, send=_NOTHING)

    # On the client

    def assemble(self, received: Tensors, companions: Tensors, kept: Tensors) -> Tensors:
        """Return the adapter with A = A0 and B = B0 R; in round 1 what came."""
        made = dict(received)
        for layer in {owner_of(name) for name in companions}:
            own = of_layer(layer, companions)
            made[factor_name(layer, "A")] = own["A0"]
            made[factor_name(layer, "B")] = _times(own["B0"], own["R"])
        return made

    def local(self, work: LocalWork) -> LocalUpdate:
        """Sketch the gradient in round 1; later train R and send it."""
        if work.round == 1:
            return LocalUpdate({}, _sketches(work))
        bases = {
            factor_name(layer, "B"): work.companions[beside(layer, "B0")][:, : _live(work, layer)]
            for layer in work.scalings
        }
        trained = work.train(work.start, Training(B_ONLY, work.plan_extras, bases=bases))
        extras = {n: tensor for n, tensor in trained.tensors.items() if parse_factor(n) is None}
        cores = {layer: trained.cores[factor_name(layer, "B")] for layer in work.scalings}
        R = {beside(layer, "R"): pad_rank(core, core.shape[1], 0) for layer, core in cores.items()}
        return LocalUpdate(extras, R)

    # On the server

    def constants(self, state: Tensors, round: int) -> Tensors:
        """Return A0 and B0."""
        return _named(state, "A0", "B0") if round > 1 else {}

    def companions(self, state: Tensors, round: int) -> Tensors:
        """Return R."""
        return _named(state, "R") if round > 1 else {}

    def companion_shapes(self, adapter: Adapter, round: int) -> Mapping[str, tuple[int, ...]]:
        """Return that two sketches of every layer come up in round 1, and R in later ones."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in adapter.layers.items():
            r, d_out, d_in = _shape(layer)
            m, rows = sketch_sizes(r, d_out, d_in)
            if round <= 1:
                shapes |= {beside(name, "Y"): (d_out, m), beside(name, "W"): (rows, d_in)}
            else:
                shapes[beside(name, "R")] = (r, r)
        return shapes

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of the sketches, or of R."""
        names = ("Y", "W") if round <= 1 else ("R",)

        def contribute(update: LayerUpdate, context: LayerContext) -> Tensors:
            """What a client adds: its sketches G Omega and Psi G, or its R (r, r)."""
            return {name: update.companions[name] for name in names}

        def start(context: LayerContext) -> Tensors:
            """What a client that has not moved adds: no gradient, or the R that it received."""
            if round > 1:
                return {"R": context.state["R"]}
            r, d_out, d_in = _shape(context.current)
            m, rows = sketch_sizes(r, d_out, d_in)
            return {"Y": torch.zeros(d_out, m), "W": torch.zeros(rows, d_in)}

        return (Phase(f"mean of {' and '.join(names)}", contribute, keep_mean, start),)

    def conclude(self, context: LayerContext) -> LayerResult:
        """Return A0 and B0 R; they are made in round 1, and afterwards only R changes."""
        if context.round <= 1:
            state = self._bases(context)
        else:
            state = {**context.state, "R": context.shared["R"]}
        factors = {"A": state["A0"], "B": _times(state["B0"], state["R"])}
        return LayerResult(context.current.with_factors(factors), state)

    def _bases(self, context: LayerContext) -> Tensors:
        """Make A0 (r, d_in), B0 (d_out, r) and R (r, r) of the sketches of the mean gradient.

        A layer with a side shorter than r has fewer singular vectors; the rest is zero.
        """
        r, d_out, d_in = _shape(context.current)
        _, psi = probes(context.seed, context.name, r, d_out, d_in)
        U, S, V = leading(context.shared["Y"], context.shared["W"], psi, r)
        step = torch.diag(-self.options.initial_lr * S)
        return {
            "A0": pad_rank(V / context.current.scaling, r, 0).float(),
            "B0": pad_rank(U, r, 1).float(),
            "R": pad_rank(pad_rank(step, r, 0), r, 1).float(),
        }


def _sketches(work: LocalWork) -> Tensors:
    """Return Y = G Omega and W = Psi G of every layer, named as companions."""
    wanted = {}
    for layer in work.scalings:
        A, B = work.start[factor_name(layer, "A")], work.start[factor_name(layer, "B")]
        wanted[layer] = probes(work.seed, layer, len(A), len(B), A.shape[1])
    found: Tensors = {}
    for layer, (Y, W) in work.sketch(wanted).items():
        found |= {beside(layer, "Y"): Y, beside(layer, "W"): W}
    return found


def _live(work: LocalWork, layer: str) -> int:
    """Return how many columns of B0 are not padding: those that a basis can have."""
    A, B = work.start[factor_name(layer, "A")], work.start[factor_name(layer, "B")]
    return min(len(A), len(B), A.shape[1])


def _shape(layer: LoraLayer) -> tuple[int, int, int]:
    return layer.rank, layer.B.shape[0], layer.A.shape[1]


def _times(B: Tensor, R: Tensor) -> Tensor:
    """Return B R in float32, rounded once: the same on the server and on clients."""
    return (B.double() @ R.double()).float()


def _named(state: Tensors, *names: str) -> Tensors:
    """Return the tensors of these short names, of all layers."""
    return {
        key: tensor
        for key, tensor in state.items()
        if key.removeprefix(beside(owner_of(key), "")) in names
    }
