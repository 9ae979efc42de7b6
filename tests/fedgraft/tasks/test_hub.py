"""Why a Hub id could not be fetched, in a clause, and what to do."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors

from fedgraft.tasks.hub import reason


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub's without the response that it comes from."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("token", "why", "remedy"),
    [
        (None, "it is gated, and there is no Hub token here", "HF_TOKEN"),
        ("hf_mine", "it is gated, and the Hub token here has no access to it", "that token's"),
    ],
)
def test_a_gated_base_names_the_token_that_is_missing(
    token: str | None, why: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    error = OSError("cannot load")
    error.__cause__ = hub_error(errors.GatedRepoError)
    found = reason(error)
    assert found[0] == why
    assert remedy in found[1] and "hf_mine" not in "".join(found)


def test_a_missing_repository_may_be_a_private_one() -> None:
    assert (
        "no such repository, or it is private"
        in reason(hub_error(errors.RepositoryNotFoundError))[0]
    )


def test_any_other_error_is_its_own_first_line() -> None:
    assert reason(ValueError("\n no config.\nand more")) == ("no config", "")
    assert reason(ValueError()) == ("ValueError", "")
