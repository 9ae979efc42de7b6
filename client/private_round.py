"""One client's round under `privacy.mode = "example"`: the noise it takes, and what it spends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from client.node import Node
from client.private_training import Privately, sampling_rate
from fedgraft.config import Config
from fedgraft.deployed import is_deployed
from fedgraft.privacy.account import Account
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.limits import NO_LIMITS, Limits
from fedgraft.privacy.randomness import Randomness, randomness
from fedgraft.tasks.task import Task

_fingerprints: WeakKeyDictionary[Task, dict[int, str]] = WeakKeyDictionary()


def fingerprint_of(task: Task, index: int) -> str:
    """Return the fingerprint of partition `index`, which is taken once."""
    known = _fingerprints.setdefault(task, {})
    if index not in known:
        known[index] = task.fingerprint(index)
    return known[index]


def account_of(config: Config, task: Task, node: Node) -> Account:
    """Return the account of a node's data, to be read.

    Raises:
        LedgerError: the ledger is damaged.
    """
    fingerprint = fingerprint_of(task, node.index)
    return Account(Ledger(node.ledger), fingerprint, "", config.privacy, limits=node.limits)


@dataclass(frozen=True)
class PrivateRound:
    """Pays for trainings out of a client's ledger, and says by which noise they are private.

    Attributes:
        config: the run's.
        round: counted from 1.
        examples: how many the client trains on.
        ledger: of its data.
        batches: draws the batches of the round's trainings.
        noise: draws their noise.
    """

    config: Config
    round: int
    examples: int
    ledger: Account
    batches: Randomness
    noise: Randomness

    @classmethod
    def open(
        cls,
        config: Config,
        task: Task,
        index: int,
        round: int,
        lineage: str,
        path: Path,
        limits: Limits = NO_LIMITS,
    ) -> PrivateRound:
        """Open the ledger for a round of partition `index`, the client of that name.

        Raises:
            LedgerError: the ledger is damaged.
        """
        examples, client = task.train(index), str(index)
        deployed = is_deployed()
        # Made once a round: two trainings on the same noise would cancel it.
        return cls(
            config,
            round,
            len(examples),
            Account(
                Ledger(path), fingerprint_of(task, index), lineage, config.privacy, limits=limits
            ),
            randomness(config, deployed, "private batches", round=round, client=client),
            randomness(config, deployed, "private noise", round=round, client=client),
        )

    def pay(self, steps: int) -> Privately:
        """Record a training of so many steps, which may then begin.

        Where the noise is to fit `privacy.target-epsilon`, the client is taken to train once in
        `federation.fraction` of the rounds that are left.

        Raises:
            PrivacyError: it would spend more than the budget.
            PolicyError: the owner of the data allows less.
            LedgerError: the ledger is damaged.
        """
        federation, batch_size = self.config.federation, self.config.train.batch_size
        rate = sampling_rate(batch_size, self.examples)
        left = max(1, federation.rounds - self.round + 1)
        times = math.ceil(federation.fraction * left)
        # As many entries as the ledger will have: sums in another order round otherwise.
        multiplier = self.ledger.noise_multiplier(
            lambda multiplier: [Release((multiplier,), rate, steps)] * times
        )
        self.ledger.record(
            self.round, Release((multiplier,), rate, steps), f"DP-SGD, {steps} steps"
        )
        return Privately(multiplier, self.config.privacy.clip, batch_size, self.batches, self.noise)
