"""Privacy by client, as one run of the server has it: its noise, its ledger and its budget."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedgraft.config import Config
from fedgraft.errors import BudgetSpentError, PrivacyError
from fedgraft.privacy.account import Account
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.randomness import Randomness, randomness
from strategies.client_privacy import ClientPrivacy
from strategies.rule import Rule, SumOnlyRule


@dataclass(frozen=True)
class PrivateFederation:
    """What a run under privacy by client holds.

    Attributes:
        mechanism: for the strategy.
        account: of what the federation's clients have been asked.
    """

    mechanism: ClientPrivacy
    account: Account

    @classmethod
    def open(
        cls, config: Config, rule: Rule, lineage: str, folder: Path, *, deployed: bool
    ) -> PrivateFederation:
        """Open the ledger, and find the noise for `privacy.target-epsilon` where that is set.

        Args:
            config: the run's, checked.
            rule: the run's, a sum-only one.
            lineage: the run's id; a resumed run goes on with the noise that it began with.
            folder: where ledgers lie.
            deployed: sampling and noise come from the operating system's entropy; otherwise from
                the run's seed, and the run is a study and no release.

        Raises:
            PrivacyError: no noise fits what is left of `privacy.target-epsilon`.
            LedgerError: the ledger is damaged.
        """
        assert isinstance(rule, SumOnlyRule)  # which `check_rule` has seen to
        privacy, federation = config.privacy, config.federation

        def source(purpose: str, round: int) -> Randomness:
            return randomness(config, deployed, f"client privacy: {purpose}", round=round)

        def mechanism(noise_multiplier: float) -> ClientPrivacy:
            return ClientPrivacy(
                noise_multiplier=noise_multiplier,
                clip=privacy.clip,
                rate=federation.fraction,
                clients=federation.clients,
                randomness=source,
                adaptive=privacy.adaptive_clip,
                study=not deployed,
            )

        account = Account(
            Ledger(folder / "server.jsonl"),
            fingerprint(config),
            lineage,
            privacy,
            unit="client",
            queries=2 if privacy.adaptive_clip else 1,
        )
        phases = [len(rule.phases(round)) for round in range(1, federation.rounds + 1)]
        noise = account.noise_multiplier(lambda z: [mechanism(z).release(n) for n in phases])
        return cls(mechanism(noise), account)

    def record(self, round: int, release: Release) -> None:
        """Write down what a round is about to release.

        Raises:
            BudgetSpentError: it would take more than `privacy.target-epsilon`.
            LedgerError: the ledger is damaged.
        """
        queries = len(release.noise_multipliers)
        told = "a noised sum" if queries == 1 else f"{queries} noised sums of the same clients"
        try:
            self.account.record(round, release, told)
        except PrivacyError as error:
            raise BudgetSpentError(error.message, error.remedy) from error


def ledger_folder(simulated: Path, *, deployed: bool) -> Path:
    """Return where the server's ledger lies: in a simulation with its run, else with the machine.

    Args:
        simulated: the run directory's folder for ledgers.
        deployed: the ledger must outlive the run.
    """
    return Path.home() / ".fedgraft" / "ledgers" if deployed else simulated


def fingerprint(config: Config) -> str:
    """Return what the server's ledger knows a federation's data by: the name of its task's data.

    The server has not seen the data, and who takes part may change from run to run. So all runs on
    data of one name count together, whoever took part: that is never too little.
    """
    named = f"{config.task.name}\x1f{config.task.data or ''}"
    return hashlib.sha256(named.encode()).hexdigest()
