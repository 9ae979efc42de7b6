"""What the rules share that hold against hostile clients: they look at products, not at factors.

A client may send (B_k Q^-1, Q A_k) for any invertible Q and mean the same update, so a distance
between factors says nothing of how far two updates lie apart, and hides an attack as easily as it
invents one. Distances here are those of what changes the model,

    d(i, j)^2 = sum over layers ||s (B_i A_i - B_j A_j)||_F^2 + sum over extras ||v_i - v_j||^2,

and come from Gram matrices of the factors (`strategies.gram`). Subclasses of `Surveyed` turn them
into a share for every client; the new adapter is the best rank-r approximation of the products so
weighted, or one client's factors as they are where that client alone is taken.

How many clients are hostile is not known. Where a rule needs the number f, `strategy.byzantine`
names it; unset, it is the largest with n >= 3 f + 1 for the round's n updates.

Capabilities: single updates are needed, so these rules do not go with secure sums; ranks may be
mixed. No server optimiser goes on top: the approximation makes the basis of the factors anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedgraft.adapter import LoraLayer
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.gram import gram_of_changes, gram_of_values
from strategies.low_rank import Term, best_rank
from strategies.mixing import MixingOptions, nearest_neighbours
from strategies.options import RuleOptions
from strategies.refusals import refuse_kept_optimizer
from strategies.rule import (
    Capabilities,
    ExtraContext,
    LayerContext,
    LayerResult,
    PerClientRule,
    SurveyingRule,
    Weighing,
    WeightedExtra,
    WeightedLayer,
)
from strategies.sampling import sample_size

ROBUST = Capabilities(sum_only=False, mixed_ranks=True, extras="robust")
"""What all of these rules can do."""

_ROUNDING = 1e-9
"""What shares that are meant to add up to 1 may lack of it."""


class WeightOptions(RuleOptions):
    """Options of robust rules whose papers weigh clients.

    Attributes:
        weights: `equal`, every client the same, or `examples`, n_k / sum n as in the papers. A
            client reports its own n_k, so `examples` trusts what a hostile one can make up.
    """

    weights: Literal["equal", "examples"] = "equal"

    def weights_of(self, shares: Sequence[float]) -> Tensor:
        """Return the clients' weights (K), float64, which add up to 1."""
        if self.weights == "examples":
            return torch.tensor(shares, dtype=torch.float64)
        return torch.full((len(shares),), 1.0 / len(shares), dtype=torch.float64)


def assumed_hostile(clients: int) -> int:
    """Return how many of a round's clients may be hostile where no option says: f, n >= 3 f + 1."""
    return (clients - 1) // 3


def clients_a_round(config: Config) -> int:
    """Return how many clients a round of this config samples."""
    return sample_size(config.federation.fraction, config.federation.clients)


def best_layer(terms: Sequence[Term], current: LoraLayer) -> LoraLayer:
    """Return the best layer of the current one's rank for a sum of products."""
    B, A = best_rank(terms, current.rank)
    return _trainable(LoraLayer(A, B, current.scaling), current)


def _trainable(layer: LoraLayer, current: LoraLayer) -> LoraLayer:
    """Return the layer with the current rows of A in directions that nothing uses.

    A sum of products may have fewer of them than the rank, and so does a client of a smaller rank.
    With both factors zero neither would get a gradient again; with B zero the product is the same.
    """
    used = (layer.A.any(1) | layer.B.any(0))[:, None]
    return layer.with_factors({"A": torch.where(used, layer.A, current.A.to(layer.A.dtype))})


class ProductRule(PerClientRule):
    """A rule that makes a product, and then the best factors for it."""

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers: the factors are of another basis in the next round.

        Raises:
            ConfigError: `train.optimizer-state` is "keep".
        """
        refuse_kept_optimizer(config, self.name, "the basis of B and A is remade")

    def cut(self, layer: LoraLayer, rank: int) -> LoraLayer:
        """Return the best approximation of a smaller rank."""
        kept = LoraLayer(layer.A[:rank], layer.B[:, :rank], layer.scaling)
        made = best_layer([(1.0, layer.B, layer.A)], kept)
        return made.with_factors({"A": made.A.to(layer.A.dtype), "B": made.B.to(layer.B.dtype)})


class Surveyed(ProductRule, SurveyingRule):
    """A rule that weighs clients by the inner products of their whole changes.

    A subclass defines `weigh`, whose survey is the Gram matrix (K, K) of what the clients changed,
    unless the subclass measures something else. One whose updates may be mixed before
    (`strategies.mixing`) defines `share` instead.
    """

    capabilities = ROBUST

    def survey(self, updates: Sequence[WeightedLayer], context: LayerContext) -> Tensor:
        """Return one layer's part of the Gram matrix, (K, K)."""
        return gram_of_changes([update.factors for update in updates], context.current)

    def survey_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> Tensor:
        """Return one extra's part of the Gram matrix, (K, K)."""
        return gram_of_values([update.value for update in updates], context.current)

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the best factors for the products weighted by `weigh`'s shares.

        What the shares lack of 1 stays with the current product.
        """
        current = context.current
        rest = 1.0 - sum(update.share for update in updates)
        terms = [(u.share, u.factors.B, u.factors.A) for u in updates if u.share > 0.0]
        if abs(rest) > _ROUNDING:
            terms.append((rest, current.B, current.A))
        if len(terms) == 1:
            _, B, A = terms[0]
            return LayerResult(_trainable(current.with_factors({"A": A, "B": B}), current))
        return LayerResult(best_layer(terms, current))


class Mixable(Surveyed):
    """A rule whose updates may be mixed with their nearest neighbours before it sees them.

    A subclass defines `share`, from the Gram matrix of the updates, mixed or not.
    """

    Options: ClassVar[type[MixingOptions]] = MixingOptions
    options: MixingOptions
    needs_byzantine: ClassVar[bool] = True
    """Whether the rule itself counts on f, and not the mixing alone."""

    def check(self, config: Config) -> None:
        """Refuse a count of hostile clients that nothing uses, and mixing that it makes useless.

        Raises:
            ConfigError: naming what to set; or as `ProductRule.check`.
        """
        super().check(config)
        f, mixing = self.options.byzantine, self.options.mixing
        if f is not None and not (mixing or self.needs_byzantine):
            raise ConfigError(
                f"strategy.byzantine is {f}, and {self.name} holds without knowing it",
                "Leave it out, or set strategy.mixing=true, which needs it.",
            )
        n = clients_a_round(config)
        if mixing and f is not None and n <= 2 * f:
            raise ConfigError(
                f"strategy.mixing needs more than 2 x strategy.byzantine = {2 * f} clients a "
                f"round, and federation.clients and federation.fraction make it {n}",
                "Sample more clients, or lower strategy.byzantine.",
            )
        if mixing and f is None and self.hostile(n) == 0:
            raise ConfigError(
                f"strategy.mixing would average all {n} clients of a round: so few leave nobody "
                f"out under {self.name}",
                "Sample more clients, or leave strategy.mixing out.",
            )

    def hostile(self, n: int) -> int:
        """Return f for a round of n updates, below half of them."""
        asked = self.options.byzantine
        return min(assumed_hostile(n) if asked is None else asked, (n - 1) // 2)

    @abstractmethod
    def share(self, gram: Tensor, shares: Sequence[float]) -> Weighing:
        """Return the shares of the updates that have these inner products, (K, K)."""

    def weigh(self, survey: Tensor, shares: Sequence[float]) -> Weighing:
        """Return the rule's shares, traced back to the updates that were mixed; M is shared."""
        if not self.options.mixing:
            return self.share(survey, shares)
        n = len(survey)
        f, asked = self.hostile(n), self.options.byzantine
        M = nearest_neighbours(survey, f)
        made = self.share(M @ survey @ M.T, shares)
        notes = made.notes
        if f < (asked or 1):
            notes += (f"mixing leaves {f} of {n} updates out, not {asked or 1}",)
        of_mixed = torch.tensor(made.shares, dtype=torch.float64, device=M.device)
        return Weighing(tuple((of_mixed @ M).tolist()), notes, {"mixing": M})
