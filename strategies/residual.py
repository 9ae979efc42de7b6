"""What joins the base: products that the factors cannot hold, as one frozen low-rank pair.

Papers add them to the weights of the base. A quantised base cannot take that, and a client that
joins late would have missed it, so the sum of all of them so far is kept beside the base as factors
B (d_out, m) and A (m, d_in) of scaling 1, sent to every client and exported with the adapter. It
grows by up to K r ranks a round; a singular value decomposition cuts it back to what the energy
asked for needs (`strategies.low_rank.to_energy`), and to min(d_out, d_in) at most. Where all of the
energy is asked for and there are hundreds of ranks in a large layer, nothing is worth looking for:
the factors are stacked as they are, and from the layer's own min(d_out, d_in) ranks on the sum is
one dense matrix beside an identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fedgraft.adapter import LoraLayer
from strategies.low_rank import Term, to_energy, uncut
from strategies.options import RuleOptions


class ResidualOptions(RuleOptions):
    """Options of rules that add to the base.

    Attributes:
        energy: the share of the energy (the squared Frobenius norm) of what has been learned that
            must be kept when the residual is compressed: 1 keeps all that float32 can tell, 0.9999
            allows a relative error of 1%, a round.
        max_rank: the residual's rank is no larger than this, whatever is lost; none when unset.
    """

    energy: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_rank: Annotated[int, Field(gt=0)] | None = None


def grown(
    residual: LoraLayer | None,
    terms: Sequence[Term],
    options: ResidualOptions,
    *,
    beside: float = 0.0,
) -> LoraLayer | None:
    """Return the residual with more products added, compressed; None when nothing is in it.

    Args:
        residual: what has joined the base so far.
        terms: what joins now, scalings included.
        options: how far to compress.
        beside: the energy of the product that the factors hold themselves.
    """
    so_far = [] if residual is None else [(residual.scaling, residual.B, residual.A)]
    whole = [*so_far, *terms]
    if not whole:
        return None
    lossless = options.energy == 1.0 and options.max_rank is None
    pair = uncut(whole) if lossless else None
    B, A = pair or to_energy(whole, options.energy, options.max_rank, beside=beside)
    return LoraLayer(A, B, 1.0) if len(A) else None
