"""What is the client's own: its name, data, base and folders, whatever a run's config says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.node import (
    ADAPTERS,
    LEAST_NOISE,
    LEDGER,
    LIFETIME_DELTA,
    LIFETIME_EPSILON,
    NAME,
    PARTITION,
    PARTITIONS,
    PERSONAL,
    NodeConfig,
)
from client.policy import Policy
from fedgraft.config import Config


@dataclass(frozen=True)
class Own:
    """What the client's own files say.

    Attributes:
        name: the client's.
        policy_file: read anew with every request.
        state: the folder of personal state, privacy ledger and the count of rounds.
        data: a file or folder; None for a task that brings its data.
        partition: which of the `partitions` of the data is this client's; None for all of them.
        partitions: into how many the data are dealt, as a simulation of as many clients does.
        base: a folder or a Hub id; None for a task that brings its base.
        revision: of a Hub id.
        offline: whether only the Hub's local cache is read.
        device: where the model runs.
    """

    name: str
    policy_file: Path
    state: Path
    data: str | None = None
    partition: int | None = None
    partitions: int = 1
    base: str | None = None
    revision: str | None = None
    offline: bool = False
    device: str = "auto"

    @property
    def ledger(self) -> Path:
        """What the data have been asked under privacy."""
        return self.state / "ledger.jsonl"

    @property
    def rounds(self) -> Path:
        """When trainings began."""
        return self.state / "rounds.json"

    def config(self, run: Config) -> Config:
        """Return a run's config with the client's own data and base in place of the run's.

        A client with data of its own is the only client of them; one with a partition deals the
        data as the run says.

        Raises:
            ConfigError: the run deals data in a way that contradicts itself.
        """
        tree = run.to_dict()
        mine: dict[str, dict[str, Any]] = {
            "task": {"data": self.data},
            "model": {
                "base": self.base,
                "revision": self.revision,
                "offline": self.offline,
                "device": self.device,
            },
        }
        if self.partition is None:
            whole = {"clients": 1, "min-clients": 1, "partition": "iid"}
            mine["federation"] = whole | {"partition-column": None, "ranks": None}
        for group, keys in mine.items():
            for key, value in keys.items():
                tree[group].pop(key, None)
                if value is not None:
                    tree[group][key] = value
        tree["adapter"].pop("from", None)  # the server's business, and a path of its own
        return Config.from_dict(tree)

    def node_config(self, policy: Policy) -> NodeConfig:
        """Return what a context says of this node."""
        limits = policy.limits(self.name)
        said: NodeConfig = {
            PARTITION: self.partition or 0,
            PARTITIONS: self.partitions if self.partition is not None else 1,
            NAME: self.name,
            PERSONAL: str(self.state / "personal"),
            ADAPTERS: str(self.state / "adapters"),
            LEDGER: str(self.ledger),
            LEAST_NOISE: limits.least_noise,
            LIFETIME_DELTA: limits.lifetime_delta,
        }
        if limits.lifetime_epsilon is not None:
            said[LIFETIME_EPSILON] = limits.lifetime_epsilon
        return said
