"""A path or a Hub id: telling the two apart, and why a Hub id could not be fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def local_path(name: str) -> Path | None:
    """Return the path that a name means, existing or not; None where it can only be a Hub id.

    A Hub id is `name` or `owner/name`, for a dataset also `owner/name:subset`. Whatever exists is
    a path, and so is what starts with a dot, a tilde or a slash, has more slashes than an id may,
    or starts with an existing folder.
    """
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith(("~", ".")):
        return path
    if not _REPOSITORY.fullmatch(name):
        return path
    return path if "/" in name and path.parent.is_dir() else None


def reason(error: BaseException) -> tuple[str, str]:
    """Say in a clause why something could not be loaded, and in a sentence what to do.

    Args:
        error: what transformers, datasets or huggingface_hub raised; its causes are read too.
    """
    from huggingface_hub import errors, get_token

    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        if get_token() is None:
            return (
                "it is gated, and there is no Hub token here",
                "Accept its terms on huggingface.co, then run `hf auth login` or set HF_TOKEN.",
            )
        return (
            "it is gated, and the Hub token here has no access to it",
            "Accept its terms on huggingface.co with that token's account, or use another's.",
        )
    if caused_by(errors.RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or it is private",
            "Check the spelling, run `hf auth login` for a private one, or name a local folder.",
        )
    if caused_by(errors.RevisionNotFoundError):
        return "it has no such revision", "Check model.revision, or leave it out."
    if caused_by(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return (
            "the Hub cannot be reached and nothing of it is in the local cache",
            "Connect to the network, download it first with `hf download`, or name a local path.",
        )
    if "trust_remote_code" in str(error):
        return (
            "it brings its own code, which is never run here",
            "Choose a base whose architecture transformers itself has.",
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first.rstrip(".") or type(error).__name__, ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
