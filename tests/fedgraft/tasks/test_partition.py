import warnings
from collections import Counter

import datasets
import numpy as np
import pytest

from fedgraft.config import Config
from fedgraft.errors import ConfigError, DataError
from fedgraft.tasks.partition import deal, domains_of, kind, validation_like

KINDS = ["iid", "dirichlet", "shards", "domain"]


def config(how: str | None = None, clients: int = 4, seed: int = 0, **federation) -> Config:
    settings = {"federation.clients": clients, "seed": seed}
    settings |= {f"federation.{key.replace('_', '-')}": value for key, value in federation.items()}
    if how:
        settings["federation.partition"] = how
    return Config().with_overrides(settings)


def table(rows: int = 200, labels: int = 5, domains: int = 3) -> datasets.Dataset:
    """Rows with text labels and numbered domains, in an order that is neither sorted nor random."""
    numbers = np.arange(rows)
    return datasets.Dataset.from_dict(
        {
            "label": [f"class {7 * n % labels}" for n in numbers],
            "domain": [int(n // labels % domains) for n in numbers],
        }
    )


def values(rows: datasets.Dataset, column: str) -> np.ndarray:
    return np.array(list(rows[column]))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("clients", [1, 2, 4, 7, 13])
def test_every_row_is_dealt_exactly_once_and_no_client_is_empty(how: str, clients: int):
    rows = table(rows=103)  # a prime: nothing divides evenly
    dealt = deal(rows, config(how, clients), label="label", domain="domain")
    assert len(dealt) == clients and all(len(own) for own in dealt)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(103))
    assert all(np.array_equal(own, np.sort(own)) for own in dealt)


@pytest.mark.parametrize("how", KINDS)
def test_the_seed_alone_decides(how: str):
    def dealt(seed: int) -> list[list[int]]:
        made = deal(table(), config(how, 7, seed), label="label", domain="domain")
        return [own.tolist() for own in made]

    assert dealt(3) == dealt(3)
    assert dealt(3) != dealt(4)


def test_the_default_is_by_domain_where_there_are_domains():
    assert kind(config()) == "iid"
    assert kind(config(), "domain") == "domain"
    assert kind(config("shards"), "domain") == "shards"


def test_iid_shares_are_even_and_mixed():
    dealt = deal(table(rows=202), config("iid", 4), label="label")
    assert sorted(len(own) for own in dealt) == [50, 50, 51, 51]
    for own in dealt:
        # 50 of 202 rows at random have a mean of 100.5 with a deviation of 7.2; a contiguous
        # quarter would be 75 away.
        assert abs(own.mean() - 100.5) < 30


def test_dirichlet_skews_labels_as_its_concentration_says():
    rows = table(rows=1000)
    labels = values(rows, "label")

    def largest_share(concentration: float) -> float:
        shares = []
        for seed in range(3):
            settings = config("dirichlet", 5, seed, concentration=concentration)
            for own in deal(rows, settings, label="label"):
                counts = Counter(labels[own].tolist())
                shares.append(max(counts.values()) / len(own))
        return float(np.mean(shares))

    # Five labels: an even mix has a largest share of 0.2. At concentration 1000 a label's share
    # varies by 0.2 * sqrt(4 / 5001) = 3 per cent of itself, so the largest stays below 0.23.
    assert largest_share(1000.0) < 0.23
    assert largest_share(1.0) > 0.3
    assert largest_share(0.05) > 0.6


def test_shards_give_each_client_two_runs_of_sorted_labels():
    rows = table(rows=200, labels=5)  # 40 of each label; 10 clients hold two shards of 10
    labels = values(rows, "label")
    dealt = deal(rows, config("shards", 10), label="label")
    assert [len(own) for own in dealt] == [20] * 10
    for own in dealt:
        assert sorted(Counter(labels[own].tolist()).values()) in ([20], [10, 10])


def test_domains_are_dealt_round_and_shared_evenly():
    rows = table(rows=300, domains=3)  # 100 of each domain
    domains = values(rows, "domain")
    dealt = deal(rows, config("domain", 7), label="label", domain="domain")
    assert [set(domains[own]) for own in dealt] == [{k % 3} for k in range(7)]
    sizes = [len(own) for own in dealt]
    assert sorted(sizes[0::3]) == [33, 33, 34]
    assert sizes[1::3] == [50, 50] and sizes[2::3] == [50, 50]


def test_fewer_clients_than_domains_hold_several():
    rows = table(rows=300, domains=5)
    domains = values(rows, "domain")
    dealt = deal(rows, config("domain", 2), label="label", domain="domain")
    assert [set(domains[own]) for own in dealt] == [{0, 2, 4}, {1, 3}]
    assert [domains_of(k, 2, 5) for k in range(2)] == [[0, 2, 4], [1, 3]]
    assert [domains_of(k, 6, 5) for k in range(6)] == [[0], [1], [2], [3], [4], [0]]


def test_a_task_without_domains_may_name_a_column():
    rows = table(domains=3)
    by_name = deal(rows, config("domain", 3, partition_column="domain"), label="label")
    own = deal(rows, config("domain", 3), label="label", domain="domain")
    assert all(np.array_equal(a, b) for a, b in zip(by_name, own, strict=True))


def test_natural_clients_are_the_sorted_values_of_a_column():
    rows = table(labels=4)
    dealt = deal(rows, config("natural", 4, partition_column="label"), label=None)
    labels = values(rows, "label")
    assert [set(labels[own]) for own in dealt] == [{f"class {k}"} for k in range(4)]
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(200))


@pytest.mark.parametrize(
    ("settings", "label", "said"),
    [
        (config("iid", 201), "label", ["201", "200 training examples", "at most 200"]),
        (config("dirichlet", 201), "label", ["201", "200"]),
        (config("natural", 4, partition_column="label"), "label", ["is 4", "5 different", "to 5"]),
        (config("natural", 4), "label", ["natural", "federation.partition-column"]),
        (config("domain", 4), "label", ["domain", "federation.partition-column"]),
        (config("natural", 4, partition_column="author"), "label", ["'author'", "label, domain"]),
        (config("shards", 4), None, ["shards", "needs labels"]),
        (config("dirichlet", 190, concentration=0.01), "label", ["concentration 0.01", "Raise"]),
        (
            config("domain", 199, partition_column="rare"),
            "label",
            ["100 clients on rare a", "4 examples", "Lower"],
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_numbers_and_a_remedy(settings, label, said):
    rows = table().add_column("rare", ["a"] * 4 + ["b"] * 196)
    if settings.federation.partition_column != "rare":
        rows = rows.remove_columns("rare")
    with pytest.raises(ConfigError) as caught:
        deal(rows, settings, label=label)
    assert caught.value.remedy
    for words in said:
        assert words in str(caught.value)


def test_a_row_without_a_value_is_refused():
    rows = datasets.Dataset.from_dict({"owner": ["a", "b", None, "a"]})
    with pytest.raises(DataError, match=r"example 2 has nothing there \(1 of 4"):
        deal(rows, config("natural", 2, partition_column="owner"), label=None)


@pytest.mark.parametrize("how", [*KINDS, "natural"])
def test_dealing_says_nothing(how: str, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = config(how, 5, partition_column="label", concentration=0.05)
        deal(table(), settings, label="label", domain="domain")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def like(how: str, clients: int, rows: datasets.Dataset, validation: datasets.Dataset, **more):
    settings = config(how, clients, **more)
    names = {"label": "label", "domain": "domain"}
    dealt = deal(rows, settings, **names)
    return dealt, validation_like(validation, rows, dealt, settings, **names)


def test_iid_validation_is_an_even_share():
    _, picked = like("iid", 4, table(), table(rows=30))
    assert sorted(len(rows) for rows in picked) == [7, 7, 8, 8]
    assert np.array_equal(np.sort(np.concatenate(picked)), np.arange(30))


def test_fewer_validation_rows_than_clients_are_shared():
    _, picked = like("iid", 7, table(), table(rows=3))
    assert [len(rows) for rows in picked] == [1] * 7
    assert set(np.concatenate(picked)) == {0, 1, 2}


def test_domain_validation_has_the_client_s_domains():
    validation = table(rows=60, domains=3)
    domains = values(validation, "domain")
    _, picked = like("domain", 2, table(domains=3), validation)
    assert np.array_equal(picked[0], np.flatnonzero(domains != 1))
    assert np.array_equal(picked[1], np.flatnonzero(domains == 1))


def test_natural_validation_has_the_client_s_value_or_an_even_share():
    validation = table(rows=30, labels=4)  # "class 4" does not occur
    labels = values(validation, "label")
    _, picked = like("natural", 5, table(labels=5), validation, partition_column="label")
    for client in range(4):
        assert np.array_equal(picked[client], np.flatnonzero(labels == f"class {client}"))
    assert len(picked[4]) == 6


@pytest.mark.parametrize("how", ["dirichlet", "shards"])
def test_validation_follows_the_client_s_label_mix(how: str):
    rows, validation = table(rows=400, labels=5), table(rows=500, labels=5)
    own, offered = values(rows, "label"), values(validation, "label")
    dealt, picked = like(how, 5, rows, validation, concentration=1.0)
    for mine, watched in zip(dealt, picked, strict=True):
        assert len(set(watched)) == len(watched)  # no row twice
        counts, seen = Counter(own[mine].tolist()), Counter(offered[watched].tolist())
        for label in {*own.tolist()}:
            # 100 of each label are there, and an even share is 100: each quota is met to a row.
            assert abs(seen[label] - 100 * counts[label] / len(mine)) < 1
        assert len(watched) == 100
