"""What a node says of itself, which no server chooses: name, data, folders and limits.

It stands in `context.node_config`. A simulation gives the partition alone; a resident trainer
(`client.resident`) gives all of it, from the client's own files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from client.privacy_ledger import ledger_path
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.privacy.limits import Limits
from fedgraft.run_directory import LEDGER_KEY, PERSONAL_KEY

NodeConfig = dict[str, str | int | float | bool]
"""As Flower's contexts hold it."""
PARTITION, PARTITIONS = "partition-id", "num-partitions"
"""Flower's own keys."""
NAME, MEMORY, PERSONAL, LEDGER = "name", "memory", "personal", "ledger"
ADAPTERS = "adapters"
"""The folder of the final adapters that a client keeps."""
LEAST_NOISE, LIFETIME_EPSILON, LIFETIME_DELTA = "least-noise", "lifetime-epsilon", "lifetime-delta"


@dataclass(frozen=True)
class Node:
    """One client's place.

    Attributes:
        index: which partition of its task's data is the client's.
        name: the client's name; the partition's index in a simulation. Random streams, personal
            state and the order of summation go by it.
        personal: the folder of what it keeps between rounds.
        ledger: the file of what its data have been asked under privacy.
        limits: what its owner allows them to be asked.
    """

    index: int
    name: str
    personal: Path
    ledger: Path
    limits: Limits

    @classmethod
    def of(cls, context: Context, config: Config) -> Node:
        """Read what a node says.

        Raises:
            ConfigError: it has no partition, or the federation has another size.
        """
        index = partition_of(context, config)
        said = context.node_config
        name = str(said.get(NAME, index))
        personal = str(said.get(PERSONAL) or context.run_config.get(PERSONAL_KEY) or "")
        lifetime = said.get(LIFETIME_EPSILON)
        return cls(
            index,
            name,
            Path(personal) if personal else Path.home() / ".fedgraft" / "personal",
            Path(str(said[LEDGER]))
            if LEDGER in said
            else ledger_path(str(context.run_config.get(LEDGER_KEY) or ""), name),
            Limits(
                name,
                float(said.get(LEAST_NOISE, 0.0)),
                None if lifetime is None else float(lifetime),
                float(said.get(LIFETIME_DELTA, Limits.lifetime_delta)),
            ),
        )


def memory_of(node_config: Mapping[str, object]) -> int:
    """Return this machine's bytes of memory, or what its node's config gives as "memory"."""
    given = node_config.get(MEMORY)
    if given is not None:
        return int(str(given))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def partition_of(context: Context, config: Config) -> int:
    """Return which partition of the data this client holds; in a simulation that is its name.

    Raises:
        ConfigError: the node has none, or the federation has another size.
    """
    partition = context.node_config.get(PARTITION)
    of = context.node_config.get(PARTITIONS, config.federation.clients)
    if partition is None:
        raise ConfigError("this node has no partition-id", "Start it with --node-config.")
    if int(of) != config.federation.clients:
        raise ConfigError(
            f"the federation has {of} nodes, but federation.clients is {config.federation.clients}",
            f"Set federation.clients={of}, or start as many nodes as it says.",
        )
    return int(partition)
