"""What tasks on tables of rows share: three splits, encoded once, dealt to clients by row."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from fedgraft.tasks import partition
from fedgraft.tasks.fingerprint import fingerprint, fingerprint_of_digests
from fedgraft.tasks.records import DIGEST, SITE
from fedgraft.tasks.splits import cut
from fedgraft.tasks.task import Batch, Examples, Task

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Encoded:
    """One split, encoded: the table's rows and the examples are the same, in the same order."""

    table: datasets.Dataset
    examples: Examples


@dataclass(frozen=True)
class Subset:
    """Some of a split's examples, which are not copied."""

    examples: Examples
    rows: partition.Rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray | None:
        """The lengths of these examples, where they have any."""
        lengths = getattr(self.examples, "lengths", None)
        return None if lengths is None else np.asarray(lengths)[self.rows]

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate the examples at these positions of the subset."""
        return self.examples.batch(self.rows[indices])


class RowsTask(Task):
    """A task whose examples are rows of a table.

    A subclass says what the given splits are (`read`) and how rows become examples (`encode`);
    cutting the splits that are not given, dealing and memory are here. Every split is encoded at
    most once, when it is first asked for.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._encoded: dict[str, Encoded] = {}
        self.given: Mapping[str, datasets.Dataset] | None = None  # instead of what `read` returns

    @abstractmethod
    def read(self) -> Mapping[str, datasets.Dataset]:
        """Return the splits that the data brings: "train", and any of the others."""

    @abstractmethod
    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Turn the rows of one split into examples; rows that cannot be used may be left out."""

    @property
    def label_column(self) -> str | None:
        """The column with the labels that dealing may go by; None for none."""
        return None

    @property
    def domain_column(self) -> str | None:
        """The column with each row's domain, by which rows are dealt by default; None for none.

        Where the data lie in a folder for each site, or a file for each client, that is `SITE`.
        """
        return SITE if SITE in self.tables["train"].column_names else None

    def train(self, client: int | None = None) -> Examples:
        """Return one client's training examples, as `partition.deal` deals them; all for None."""
        examples = self.split("train").examples
        return examples if client is None else Subset(examples, self._dealt[self._check(client)])

    def validation(self, client: int | None = None) -> Examples:
        """Return validation examples like one client's own; the whole split for None."""
        examples = self.split("validation").examples
        return examples if client is None else Subset(examples, self._alike[self._check(client)])

    def test(self, client: int | None = None) -> Examples:
        """Return test examples like one client's own; the whole split for None."""
        examples = self.split("test").examples
        return (
            examples if client is None else Subset(examples, self._alike_test[self._check(client)])
        )

    @property
    def remembered(self) -> bool:
        """Whether clients keep a ledger of their data, and so need the digests of whole rows."""
        return self.config.privacy.mode in ("example", "local")

    def fingerprint(self, client: int) -> str:
        """Return the fingerprint of a client's rows as they were read, where digests are kept."""
        table, rows = self.split("train").table, self._dealt[self._check(client)]
        if DIGEST in table.column_names:
            return fingerprint_of_digests(table.select(rows)[DIGEST])
        return fingerprint(self.train(client))

    def table(self, split: str, client: int | None) -> datasets.Dataset:
        """Return the rows of "validation" or "test" that are like a client's own; all for None."""
        table = self.split(split).table
        if client is None:
            return table
        alike = self._alike_test if split == "test" else self._alike
        return table.select(alike[self._check(client)])

    def describe(self, client: int) -> str:
        """Say of which domain, owner or labels a client's examples are; "" where of all alike."""
        rows = self._dealt[self._check(client)]
        if self._told_by is None:
            return ""
        counts = Counter(self._told_by[rows].tolist()).most_common(3)
        if len(counts) == 1:
            return str(counts[0][0])
        return ", ".join(f"{count / len(rows):.0%} {value}" for value, count in counts)

    @cached_property
    def _told_by(self) -> partition.Values | None:
        """What tells the training rows of one client from another's, if anything does."""
        column = self.dealt_by
        return None if column is None else np.asarray(self.split("train").table[column][:])

    @property
    def dealt_by(self) -> str | None:
        """The column by which rows are dealt to clients; None where by chance alone."""
        return {
            "domain": self.domain_column or self.config.federation.partition_column,
            "natural": self.config.federation.partition_column or self.domain_column,
            "dirichlet": self.config.federation.partition_column or self.label_column,
            "shards": self.config.federation.partition_column or self.label_column,
        }.get(partition.kind(self.config, self.domain_column))

    def split(self, name: str) -> Encoded:
        """Return one of "train", "validation" and "test", encoded."""
        if name not in self._encoded:
            self._encoded[name] = self.encode(self.tables[name], name)
        return self._encoded[name]

    @cached_property
    def tables(self) -> dict[str, datasets.Dataset]:
        """The three splits before encoding, those that were not given cut from the first."""
        given = self.read() if self.given is None else self.given
        evaluate, samples = self.config.evaluate, self.config.task.samples
        sizes = {name: len(table) for name, table in given.items()}
        parts = cut(sizes, evaluate.fraction, samples, evaluate.samples)
        return {name: given[source].select(rows) for name, (source, rows) in parts.items()}

    @cached_property
    def _dealt(self) -> list[partition.Rows]:
        return partition.deal(
            self.split("train").table,
            self.config,
            label=self.label_column,
            domain=self.domain_column,
        )

    @cached_property
    def _alike(self) -> list[partition.Rows]:
        return self._rows_alike("validation")

    @cached_property
    def _alike_test(self) -> list[partition.Rows]:
        return self._rows_alike("test")

    def _rows_alike(self, split: str) -> list[partition.Rows]:
        return partition.validation_like(
            self.split(split).table,
            self.split("train").table,
            self._dealt,
            self.config,
            label=self.label_column,
            domain=self.domain_column,
        )

    def _check(self, client: int) -> int:
        clients = self.config.federation.clients
        if not 0 <= client < clients:
            raise ConfigError(
                f"there is no client {client}: federation.clients is {clients}",
                f"Clients are numbered from 0 to {clients - 1}.",
            )
        return client
