"""One row a rule for the shared property tests; a new rule adds its row to ROWS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dense
import numpy as np
from federations import cached_rule

from strategies.rule import Rule

Factors = Callable[[list[dense.Client]], tuple[np.ndarray, np.ndarray]]
Mixed = Callable[[list[dense.Client], list[int], dense.Client], tuple[np.ndarray, np.ndarray]]
Product = Callable[[list[dense.Client], dense.Client], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One rule of the shared tests.

    Attributes:
        name, options: as a config has them.
        factors: those that clients upload in round 1.
        oracle: A and B from dense numpy; None where the rule is defined by its product, or where
            its own file has a better test.
        product: B A with what joins the base, from dense numpy, given the clients and the current
            layer (with a share of 0); scalings are left out, since all are equal.
        mixed: A and B of clients of different ranks, given their padded factors, their ranks and
            the current layer; where it is not the oracle or the product of padded factors.
        tolerance: of A and B, or of the product, relative to the clients' size. float32 results of
            float64 sums are off by half a unit in the last place, 6e-8; a solve adds its condition
            number.
        identity: the aggregate of equal clients is their common update: "factors" when its
            factors are, "product" when only its product is, "" when the rule means to differ.
        exact_bits: a common scaling changes no bit of the factors, and equal clients give their
            common factors bit for bit.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    factors: str = "AB"
    oracle: Factors | None = None
    product: Product | None = None
    mixed: Mixed | None = None
    tolerance: float = 1e-6
    identity: str = "factors"
    exact_bits: bool = True

    def rule(self) -> Rule:
        return cached_rule(self.name, **self.options)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])


def mean_of_products(clients: list[dense.Client], current: dense.Client) -> np.ndarray:
    return dense.ideal(clients)


ROWS = [
    Row(
        "fedavg",
        oracle=dense.means,
        mixed=lambda *round: dense.means_and_unheld(dense.means, *round),
    ),
    Row("ffa-lora", factors="B", oracle=dense.means),
    # the condition number of G + lambda I is at most 1 + r / lambda_rel; float32 contributions
    # (eps 6e-8) of drifts that do not average out are amplified by its root
    Row("lora-fair", oracle=lambda clients: dense.ridge(clients, 1e-2), tolerance=1e-5),
    Row("lora-fair", {"lambda": 1.0}, oracle=lambda clients: dense.ridge(clients, 1.0)),
    # no formula, see test_lora_fair.py; a root of F is refined to 1e-12, not exact
    Row("lora-fair", {"objective": "cosine"}, exact_bits=False),
    Row("fedex-lora", oracle=dense.means, product=mean_of_products),
    # product only: an SVD leaves the basis of equal values open
    Row("fedsvd", factors="B", product=mean_of_products, identity="product", exact_bits=False),
    Row("flexlora", product=dense.best_of_rank, identity="product", exact_bits=False),
    Row("flora", product=mean_of_products, identity="product", exact_bits=False),
    Row(
        "hetlora",
        oracle=dense.by_norms,
        mixed=lambda *round: dense.means_and_unheld(dense.by_norms, *round),
    ),
    Row("rolora", factors="B", oracle=dense.means),
    # the next six are tested in test_weighing_rules.py, test_coordinatewise.py and test_robust.py
    # ranks that nothing uses keep their A, so the product
    Row("krum", identity="product"),
    Row("multi-krum", identity="product", exact_bits=False),
    Row("geometric-median", identity="product", exact_bits=False),
    Row("norm-bounding", identity="product", exact_bits=False),
    Row("trimmed-mean", identity="product", exact_bits=False),
    Row("coordinate-median", identity="product", exact_bits=False),
    Row("geometric-median", {"weights": "examples"}, identity="product", exact_bits=False),
    # mixed before, see test_mixing.py
    Row("geometric-median", {"mixing": True}, identity="product", exact_bits=False),
    Row("coordinate-median", {"mixing": True}, identity="product", exact_bits=False),
    # a sparse part that all clients share is scaled too, see test_fedrpca.py
    Row("fedrpca", identity=""),
    # from the mean to a step from it, see test_server_optimizer.py
    Row("fedavgm", exact_bits=False),
    Row("fedadam", identity=""),
    Row("fedyogi", identity=""),
    Row("fedadagrad", identity=""),
    # the server's halves; the clients' are in their own files
    Row("fedrot-lora", oracle=dense.means),
    Row("fedsa-lora", factors="A", oracle=dense.means),
    Row("flasc", {"server-optimizer": "none"}, oracle=dense.means),
    Row("lora-a2", factors="B", oracle=dense.means),
]
ELSEWHERE = {"fed-sb", "scaffold"}
"""Rules whose updates are others than A and B, and have a harness in their own file."""
