"""What some data have been asked in a run, and what they may still be: a ledger with a budget.

Every release is recorded before its data are touched, so that a crash can only count too much. A
client keeps such an account of its own data, and the server one of its federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedgraft.config import PrivacyConfig
from fedgraft.errors import BUDGET, PrivacyError
from fedgraft.privacy.accounting import calibrate, epsilon
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Entry, Ledger
from fedgraft.privacy.limits import NO_LIMITS, Limits

EPSILON, EPSILON_LEFT = "epsilon", "epsilon-left"
"""What a client tells of its account: spent at `privacy.delta`, left of its owner's lifetime."""
_MUCH = 1e4
"""A noise multiplier beside which no other is needed."""
Plan = Callable[[float], Sequence[Release]]
"""The releases that are planned, as a function of the noise multiplier."""


@dataclass(frozen=True)
class Account:
    """The ledger of some data, as one run uses it.

    Attributes:
        ledger: the file.
        fingerprint: of the data.
        run: the run's lineage.
        settings: `[privacy]`.
        unit: what is added or replaced: an "example", or a "client" with all it has.
        relation: between data sets that are to look alike.
        sensitivity: clips by which one unit moves what is noised: 1 where it is added or removed,
            2 where it is replaced.
        queries: of a release, those that share what the config's noise multiplier says.
        limits: what the owner of the data allows.
    """

    ledger: Ledger
    fingerprint: str
    run: str
    settings: PrivacyConfig
    unit: Literal["example", "client"] = "example"
    relation: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one"
    sensitivity: float = 1.0
    queries: int = 1
    limits: Limits = NO_LIMITS

    def noise_multiplier(self, planned: Plan) -> float:
        """Return the noise's standard deviation over the clip, the same in all rounds of a run.

        It is the config's own; else the one that the run's first round took, which fitted what was
        left of `privacy.target-epsilon` then.

        Args:
            planned: the releases from this round to the run's last.

        Raises:
            PrivacyError: no noise fits what is left of `privacy.target-epsilon`.
            PolicyError: the owner of the data wants more of it.
            LedgerError: the ledger is damaged.
        """
        multiplier = self._noise_multiplier(planned)
        self.limits.check_noise(multiplier)
        return multiplier

    def _noise_multiplier(self, planned: Plan) -> float:
        settings = self.settings
        if settings.noise_multiplier is not None:
            return settings.noise_multiplier
        assert settings.target_epsilon is not None  # the config has one of them
        for entry in self.ledger.entries:
            if (entry.fingerprint, entry.run) == (self.fingerprint, self.run):
                first = entry.release.noise_multipliers[: self.queries]
                return (
                    self.sensitivity
                    * replace(entry.release, noise_multipliers=first).noise_multiplier
                )
        spent = self.ledger.releases(self.fingerprint)
        self._check_budget([*spent, *planned(_MUCH)])  # else no noise fits what is left
        return calibrate(
            settings.target_epsilon, settings.delta, planned, spent, settings.accountant
        )

    def record(self, round: int, release: Release, purpose: str) -> None:
        """Write down a release that is about to be made.

        Args:
            round: of the run.
            release: as it is accounted for.
            purpose: what is released, for people to read.

        Raises:
            PrivacyError: it would take more than `privacy.target-epsilon`. Nothing is written then,
                unless another run has written to the ledger at the same moment.
            PolicyError: it would take more than the owner of the data allows.
            LedgerError: the ledger is damaged.
        """
        settings = self.settings
        self.limits.check_lifetime(self.ledger, [release])
        self._check_budget([*self.ledger.releases(self.fingerprint), release])
        self.ledger.record(
            Entry(
                fingerprint=self.fingerprint,
                run=self.run,
                round=round,
                mode=settings.mode,
                unit=self.unit,
                relation=self.relation,
                release=release,
                delta=settings.delta,
                purpose=purpose,
            )
        )
        self._check_budget(self.ledger.releases(self.fingerprint))

    def epsilon(self) -> float:
        """Return what all releases of these data amount to, at `privacy.delta`."""
        return self.ledger.epsilon(self.fingerprint, self.settings.delta, self.settings.accountant)

    def told(self) -> dict[str, float]:
        """Return what a client tells of it: what is spent, and what its owner leaves."""
        left = self.limits.left(self.ledger)
        return {EPSILON: self.epsilon()} | ({} if left is None else {EPSILON_LEFT: left})

    def _check_budget(self, releases: Sequence[Release]) -> None:
        """Raise a refusal if releases amount to more than the budget, where there is one."""
        target = self.settings.target_epsilon
        if target is None:
            return
        found = epsilon(releases, self.settings.delta, self.settings.accountant)
        if found > target:
            amount = f"{found:.4g}" if math.isfinite(found) else "more than any number"
            raise PrivacyError(
                f"{BUDGET}: this round would bring epsilon to {amount}, and "
                f"privacy.target-epsilon is {target:g}",
                "Raise privacy.target-epsilon, or go on without these data.",
            )
