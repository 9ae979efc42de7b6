from __future__ import annotations

import json
import math

from fedgraft.config import Config
from server.guarantee import guarantee, in_words


def private(mode: str, **more: object) -> Config:
    settings = {"privacy.mode": mode, "privacy.noise-multiplier": 1.0, **more}
    return Config().with_overrides(settings)


def test_a_run_without_privacy_promises_nothing() -> None:
    assert guarantee(Config(), None, deployed=True) is None
    assert in_words(None) == "none"


def test_every_figure_stands_with_its_words() -> None:
    found = guarantee(private("example"), 2.7182, deployed=True)
    assert found == {
        "mode": "example",
        "epsilon": 2.7182,
        "told": 2.7182,
        "untold": 0,
        "delta": 1e-5,
        "unit": "one example of a client",
        "relation": "add-or-remove-one",
        "against": "everybody, the server included",
        "accountant": "rdp",
        "study": False,
    }
    assert in_words(found) == (
        "epsilon 2.719 at delta 1e-05 for one example of a client (add-or-remove-one), against "
        "everybody, the server included; Renyi (RDP) accountant, all that the ledgers hold"
    )


def test_clients_that_do_not_tell_leave_the_epsilon_unknown() -> None:
    found = guarantee(private("example"), 2.7182, deployed=True, untold=2)
    assert found is not None and (found["epsilon"], found["told"], found["untold"]) == (
        None,
        2.7182,
        2,
    )
    assert in_words(found).startswith(
        "epsilon unknown, since 2 do not tell theirs (the others: 2.719), at delta 1e-05"
    )
    nobody = guarantee(private("example"), None, deployed=True, untold=1)
    assert "epsilon unknown, since 1 do not tell theirs (the others: nothing)," in in_words(nobody)


def test_a_study_says_that_it_is_none_and_a_relation_what_it_is() -> None:
    settings = {"privacy.accountant": "pld", "federation.sampling": "poisson"}
    words = in_words(guarantee(private("client", **settings), 1.0, deployed=False))
    assert "for one client (add-or-remove-one), against whoever sees the adapters" in words
    assert words.endswith("A study and no release: noise and samples came from the run's seed")
    assert "(PLD) accountant" in words
    assert "(replace-one)" in in_words(guarantee(private("local"), 1.0, deployed=True))


def test_an_epsilon_without_bound_is_written_as_json_can() -> None:
    found = guarantee(private("local"), math.inf, deployed=True)
    assert json.loads(json.dumps(found, allow_nan=False))["epsilon"] is None
    assert in_words(found).startswith("epsilon without bound at delta 1e-05")
