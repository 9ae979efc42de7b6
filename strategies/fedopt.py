"""FedAvgM, FedAdam, FedYogi, FedAdagrad: FedAvg with a server optimiser, under their own names.

"Adaptive Federated Optimization"
Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv
Kumar, H. Brendan McMahan. ICLR 2021. https://arxiv.org/abs/2003.00295 (algorithm 2)

"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. 2019. https://arxiv.org/abs/1909.06335 (FedAvgM)

The same as `strategy.name=fedavg` with `strategy.server-optimizer` set to avgm, adam, yogi or
adagrad; that option puts the optimiser on top of other rules too. The formulas are in
`strategies.server_optimizer`. Both factors and the extras are stepped, each by itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from strategies.fedavg import FedAvg
from strategies.options import SteppedOptions

_REDDI = "Reddi et al., ICLR 2021, arXiv:2003.00295"


class AvgMOptions(SteppedOptions):
    """Options of FedAvgM, which has no other server optimiser."""

    server_optimizer: Literal["avgm"] = "avgm"


class AdamOptions(SteppedOptions):
    """Options of FedAdam, which has no other server optimiser."""

    server_optimizer: Literal["adam"] = "adam"


class YogiOptions(SteppedOptions):
    """Options of FedYogi, which has no other server optimiser."""

    server_optimizer: Literal["yogi"] = "yogi"


class AdagradOptions(SteppedOptions):
    """Options of FedAdagrad, which has no other server optimiser."""

    server_optimizer: Literal["adagrad"] = "adagrad"


class FedAvgM(FedAvg):
    """Average the factors and step with momentum."""

    name = "fedavgm"
    title = "FedAvgM"
    citation = "Hsu et al. 2019, arXiv:1909.06335"
    Options: ClassVar[type[SteppedOptions]] = AvgMOptions


class FedAdam(FedAvg):
    """Average the factors and step with Adam."""

    name = "fedadam"
    title = "FedAdam"
    citation = _REDDI
    Options: ClassVar[type[SteppedOptions]] = AdamOptions


class FedYogi(FedAvg):
    """Average the factors and step with Yogi."""

    name = "fedyogi"
    title = "FedYogi"
    citation = _REDDI
    Options: ClassVar[type[SteppedOptions]] = YogiOptions


class FedAdagrad(FedAvg):
    """Average the factors and step with Adagrad."""

    name = "fedadagrad"
    title = "FedAdagrad"
    citation = _REDDI
    Options: ClassVar[type[SteppedOptions]] = AdagradOptions
