"""How training rows are dealt to the clients of a simulation, the same for every task.

The dealing itself is flwr-datasets' (Flower's library of partitioners). This module chooses the
partitioner, seeds it from the run's seed, refuses what would leave a client without examples, and
says which validation rows are like a client's own. It works on columns only: rows are named by
their position.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.seeds import stream
from fedgraft.tasks.records import SITE

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner

Rows = NDArray[np.int64]
"""Positions of rows in a table, ascending."""
Values = NDArray[np.generic]
"""One column of a table."""


def kind(config: Config, domain: str | None = None) -> str:
    """Return how rows are dealt: `federation.partition` or, unset, by domain where there is one."""
    return config.federation.partition or ("domain" if domain else "iid")


def domains_of(client: int, clients: int, domains: int) -> list[int]:
    """Return which domains a client holds: one, or several where clients are fewer."""
    if clients >= domains:
        return [client % domains]
    return list(range(client, domains, clients))


def deal(
    table: datasets.Dataset, config: Config, *, label: str | None, domain: str | None = None
) -> list[Rows]:
    """Deal the training rows to `federation.clients` clients.

    - iid: a shuffled even share each.
    - dirichlet: each label is split in proportions drawn from Dirichlet(`federation.concentration`)
      (Yurochkin et al. 2019, arXiv:1905.12022).
    - shards: the rows sorted by label are cut into two shards a client and dealt at random (McMahan
      et al. 2017, arXiv:1602.05629, section 3).
    - domain: client k holds domain k mod D; clients of one domain share its rows evenly, and where
      clients are fewer than the D domains each holds several.
    - natural: a client for each value of `federation.partition-column`, or each domain where that
      is not set, in sorted order.

    Args:
        table: the training rows; only the columns named here are read.
        config: its `federation` group and its seed; the same ones give the same dealing.
        label: the column with the labels, by which dirichlet and shards go unless
            `federation.partition-column` names another, a topic, say; None for a task without.
        domain: the column with the domains of a task that has them, which are then the default;
            without it, `federation.partition-column` names the one that partition "domain" takes.

    Returns:
        The rows of each client: every row is dealt to exactly one, and no client is empty.

    Raises:
        ConfigError: more clients than rows, a missing column, a number of clients that does not
            fit the data.
        DataError: a row without a value in the column that decides.
    """
    clients, how = config.federation.clients, kind(config, domain)
    if clients > len(table):
        raise ConfigError(
            f"federation.clients is {clients}, more than the {len(table)} training examples",
            f"Set federation.clients to at most {len(table)}, or bring more examples.",
        )
    order = stream(config.seed, "partition").permutation(len(table))
    if how == "iid":
        return _load(how, config, np.zeros(len(table), np.int64), order)
    column = _column(config, how, label, domain)
    values = _values(table, column, how)
    if how == "domain":
        values = _sites(values, clients, order, column)
    elif how == "natural" and len(np.unique(values)) != clients:
        count = len(np.unique(values))
        raise ConfigError(
            f"federation.clients is {clients}, but column {column!r} has {count} different values",
            f"Set federation.clients to {count}.",
        )
    return _load(how, config, values, order)


def validation_like(
    validation: datasets.Dataset,
    table: datasets.Dataset,
    dealt: list[Rows],
    config: Config,
    *,
    label: str | None,
    domain: str | None = None,
) -> list[Rows]:
    """Pick validation rows that are like each client's own training rows.

    With partition domain and natural: the rows of the client's own domains or value. With
    dirichlet and shards: rows in the proportions of the client's labels, as many as an even share
    holds where there are enough of each label. With iid, and where a client's values do not occur
    in the validation split: an even share. Clients of one domain or label may share rows.

    Args:
        validation: the validation split, one row at least, with the columns of `table`.
        table: the training rows that `dealt` was dealt from.
        dealt: what `deal` returned for this config.
        config: as for `deal`.
        label: as for `deal`.
        domain: as for `deal`.

    Returns:
        The rows of each client in `validation`, at least one each.
    """
    clients, how = len(dealt), kind(config, domain)
    order = stream(config.seed, "validation").permutation(len(validation))
    even = [np.sort(np.resize(order, max(clients, len(order)))[k::clients]) for k in range(clients)]
    if how == "iid":
        return even
    column = _column(config, how, label, domain)
    if column == SITE and SITE not in validation.column_names:  # a file of its own, of no site
        return even
    own, offered = _values(table, column, how), _values(validation, column, how)
    picked: list[Rows] = []
    for client, rows in enumerate(dealt):
        if how in ("domain", "natural"):
            like = np.flatnonzero(np.isin(offered, own[rows]))
        else:
            like = _mixed_like(own[rows], offered, order, len(even[client]))
        picked.append(like if len(like) else even[client])
    return picked


def _load(how: str, config: Config, values: Values, order: Rows) -> list[Rows]:
    """Run a partitioner over the rows in a seeded order and read the dealt positions back."""
    import datasets

    clients = config.federation.clients
    partitioner = _partitioner(how, config, len(order))
    partitioner.dataset = datasets.Dataset.from_dict(
        {"row": order.tolist(), "value": values[order].tolist()}
    )
    # NaturalIdPartitioner draws a progress bar, DirichletPartitioner warns of every new attempt.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parts = [partitioner.load_partition(k) for k in range(clients)]
        except ValueError:
            if how != "dirichlet":
                raise
            raise ConfigError(
                f"with federation.concentration {config.federation.concentration} some of "
                f"{clients} clients get none of the {len(order)} training examples",
                "Raise federation.concentration or lower federation.clients.",
            ) from None
    return [np.sort(np.asarray(part.with_format("numpy")["row"][:], np.int64)) for part in parts]


def _partitioner(how: str, config: Config, rows: int) -> Partitioner:
    from flwr_datasets import partitioner

    clients = config.federation.clients
    seed = int(stream(config.seed, f"partition-{how}").integers(2**31))
    if how == "iid":
        return partitioner.IidPartitioner(clients)
    if how == "dirichlet":
        return partitioner.DirichletPartitioner(
            clients, "value", config.federation.concentration, min_partition_size=1, seed=seed
        )
    if how == "shards":
        # Rounded up and the last shard kept short: the other way round rows would be dropped.
        size = -(-rows // (2 * clients))
        return partitioner.ShardPartitioner(
            clients, "value", shard_size=size, keep_incomplete_shard=True, seed=seed
        )
    return partitioner.NaturalIdPartitioner("value")


def _sites(domains: Values, clients: int, order: Rows, column: str) -> NDArray[np.int64]:
    """Say for each row which client takes it, the rows of a domain shared evenly."""
    names = np.unique(domains)
    sites = np.empty(len(domains), np.int64)
    for number, name in enumerate(names):
        rows = order[domains[order] == name]
        takers = [k for k in range(clients) if number in domains_of(k, clients, len(names))]
        if len(takers) > len(rows):
            raise ConfigError(
                f"federation.clients {clients} puts {len(takers)} clients on {column} {name}, "
                f"which has {len(rows)} examples",
                "Lower federation.clients, or bring more examples.",
            )
        sites[rows] = np.resize(takers, len(rows))
    return sites


def _mixed_like(own: Values, offered: Values, order: Rows, size: int) -> Rows:
    """Pick about `size` offered rows, in `order`, with the label proportions of `own`."""
    labels, counts = np.unique(own, return_counts=True)
    wanted = size * counts / counts.sum()
    quotas = np.floor(wanted).astype(np.int64)
    remainders = np.argsort(quotas - wanted, kind="stable")
    quotas[remainders[: size - quotas.sum()]] += 1
    picked = [
        order[offered[order] == name][:quota] for name, quota in zip(labels, quotas, strict=True)
    ]
    return np.sort(np.concatenate(picked))


def _column(config: Config, how: str, label: str | None, domain: str | None) -> str:
    """Return the column by which rows are dealt."""
    named = config.federation.partition_column
    if how in ("dirichlet", "shards"):
        label = named or label
        if label is None:
            raise ConfigError(
                f"federation.partition {how} needs labels, and task {config.task.name} has none",
                "Set federation.partition to iid or natural.",
            )
        return label
    column = domain or named if how == "domain" else named or domain
    if column is None:
        raise ConfigError(
            f"federation.partition {how} needs a column of the data",
            "Set federation.partition-column to its name.",
        )
    return column


def _values(table: datasets.Dataset, column: str, how: str) -> Values:
    """Read one column, refusing rows without a value."""
    if column not in table.column_names:
        raise ConfigError(
            f"federation.partition {how} goes by column {column!r}, which the data does not have",
            f"The data's columns: {', '.join(table.column_names)}.",
        )
    values = list(table[column])
    missing = [number for number, value in enumerate(values) if value is None]
    if missing:
        raise DataError(
            f"column {column!r} decides which client gets a row, and example {missing[0]} has "
            f"nothing there ({len(missing)} of {len(values)} are empty)",
            "Fill that column, or choose another federation.partition.",
        )
    return np.asarray(values)
