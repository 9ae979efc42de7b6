"""`privacy.mode = "local"`: a client clips its whole update and noises it before it leaves.

What a client sends in a round (factors, extras, and what its rule sends beside them) is one vector,
taken from what it was sent: its change is clipped to a norm of C and gets N(0, (z C)^2) on every
coordinate. Whatever the server is then shown of this client is post-processing of that.

The guarantee is the client's: its update looks like that of the same client with any other data in
their place. Replacing them may move a clipped change by 2 C, so the multiplier accounted for is
z / 2, and nothing is sampled that could amplify it: the server knows whom it asked.

Clip and noise are float64; the sum is rounded to float32 for the wire, which is post-processing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from client.private_round import fingerprint_of
from fedgraft.adapter import Tensors
from fedgraft.config import Config
from fedgraft.deployed import is_deployed
from fedgraft.errors import DIVERGED
from fedgraft.privacy.account import Account
from fedgraft.privacy.events import Release
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.limits import NO_LIMITS, Limits
from fedgraft.privacy.randomness import Randomness, add_noise, randomness
from fedgraft.tasks.task import Task
from strategies.local import LocalUpdate

log = logging.getLogger(__name__)
SENSITIVITY = 2.0
"""Clips by which a change moves when a client's data are replaced by others."""


@dataclass(frozen=True)
class LocalNoise:
    """One round's noise, which has been paid for.

    Attributes:
        clip: C, the largest norm of the client's change.
        noise_multiplier: z, the noise's standard deviation over C.
        source: of the noise.
        account: of the client's data.
    """

    clip: float
    noise_multiplier: float
    source: Randomness
    account: Account

    @classmethod
    def pay(
        cls,
        config: Config,
        task: Task,
        index: int,
        round: int,
        lineage: str,
        path: Path,
        limits: Limits = NO_LIMITS,
    ) -> LocalNoise:
        """Record the round of partition `index` in its ledger, before anything is trained.

        Where the noise is to fit `privacy.target-epsilon`, the client is taken to be asked in
        `federation.fraction` of the rounds that are left.

        Raises:
            PrivacyError: it would spend more than the budget.
            PolicyError: the owner of the data allows less.
            LedgerError: the ledger is damaged.
        """
        client, federation = str(index), config.federation
        account = Account(
            Ledger(path),
            fingerprint_of(task, index),
            lineage,
            config.privacy,
            unit="client",
            relation="replace-one",
            sensitivity=SENSITIVITY,
            limits=limits,
        )
        left = max(1, federation.rounds - round + 1)
        times = math.ceil(federation.fraction * left)
        z = account.noise_multiplier(lambda multiplier: [_release(multiplier)] * times)
        account.record(round, _release(z), "a whole update, clipped and noised")
        source = randomness(config, is_deployed(), "local noise", round=round, client=client)
        return cls(config.privacy.clip, z, source, account)

    def cover(
        self, update: LocalUpdate, start: Mapping[str, Tensor], received: Mapping[str, Tensor]
    ) -> LocalUpdate:
        """Return what may leave: the update with its change clipped and noised.

        Args:
            update: what the rule would send; what it keeps on the client stays as it is.
            start: the adapter that the client held, by tensor name.
            received: what the rule sent beside it; what is not in there starts from zero.

        Returns:
            What may leave; of an update that is not finite, noise alone.
        """
        sent = update.tensors | update.companions
        begin = {
            name: start[name]
            if name in update.tensors
            else received.get(name, tensor.new_zeros(()))
            for name, tensor in sent.items()
        }
        changes = {name: tensor.double() - begin[name].double() for name, tensor in sent.items()}
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        if not math.isfinite(norm):  # to refuse it would tell of the data
            log.warning(
                "%s: the update is not finite, and is noise alone. Lower train.lr.", DIVERGED
            )
            changes = {name: torch.zeros_like(change) for name, change in changes.items()}
        scale = self.clip / norm if norm > self.clip else 1.0
        covered: Tensors = {}
        for name, change in sorted(changes.items()):
            noised = add_noise(scale * change, self.noise_multiplier * self.clip, self.source)
            covered[name] = (begin[name].double() + noised).to(torch.float32)
        return replace(
            update,
            tensors={name: covered[name] for name in update.tensors},
            companions={name: covered[name] for name in update.companions},
        )


def _release(noise_multiplier: float) -> Release:
    return Release((noise_multiplier / SENSITIVITY,), 1.0)
