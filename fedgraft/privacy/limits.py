"""What the owner of some data allows them to be asked, whatever a run's config says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedgraft.errors import LIFETIME, POLICY, PolicyError
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Ledger


@dataclass(frozen=True)
class Limits:
    """The owner's limits on noise and on what all runs together may learn.

    The lifetime's epsilon is over every entry of the ledger, whatever fingerprint it has: the
    server chooses how rows are encoded, and rows encoded in another way have another fingerprint.

    Attributes:
        owner: who sets them, for messages: a client's name.
        least_noise: the smallest noise multiplier.
        lifetime_epsilon: the most that all releases may amount to; None for any amount.
        lifetime_delta: at which delta.
    """

    owner: str = ""
    least_noise: float = 0.0
    lifetime_epsilon: float | None = None
    lifetime_delta: float = 1e-5

    def check_noise(self, multiplier: float) -> None:
        """Refuse noise that is too small; `multiplier` is its standard deviation over the clip.

        Raises:
            PolicyError: it is.
        """
        if multiplier < self.least_noise:
            raise PolicyError(
                f"{POLICY} {self.owner}, noise-multiplier: the run's noise is "
                f"{multiplier:.4g} times its clip, and at least {self.least_noise:g} is wanted",
                "Raise privacy.noise-multiplier, or lower privacy.target-epsilon.",
            )

    def check_lifetime(self, ledger: Ledger, more: Sequence[Release] = ()) -> None:
        """Refuse releases that would bring the ledger beyond the lifetime's epsilon.

        Args:
            ledger: of the owner's data.
            more: what is about to be released; nothing, to ask whether anything is left at all.

        Raises:
            PolicyError: they would.
            LedgerError: the ledger is damaged.
        """
        limit = self.lifetime_epsilon
        if limit is None:
            return
        found = self._spent(ledger, more)
        if found > limit or (not more and found == limit):
            amount = f"{found:.4g}" if math.isfinite(found) else "more than any number"
            verb = "this round would bring epsilon to" if more else "epsilon is at"
            raise PolicyError(
                f"{POLICY} {self.owner}, {LIFETIME}: {verb} {amount}, "
                f"and {limit:g} is all that these data may ever spend",
                "Add noise, take fewer rounds, or go on without this client.",
            )

    def left(self, ledger: Ledger) -> float | None:
        """Return what is left of the lifetime's epsilon; None where nothing bounds it.

        Raises:
            LedgerError: the ledger is damaged.
        """
        limit = self.lifetime_epsilon
        return None if limit is None else max(0.0, limit - self._spent(ledger))

    def _spent(self, ledger: Ledger, more: Sequence[Release] = ()) -> float:
        from fedgraft.privacy.accounting import epsilon  # brings scipy's slow import with it

        releases = [*(entry.release for entry in ledger.entries), *more]
        return epsilon(releases, self.lifetime_delta) if releases else 0.0


NO_LIMITS = Limits()
