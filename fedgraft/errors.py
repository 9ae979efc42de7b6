"""Errors that say what went wrong and what to do about it.

Every error a user can cause is a `FedGraftError`: a message that names the key, file, client or
tensor and the value found, and a remedy. The command line prints both in one or two lines and
exits with `exit_status`; anything else is a bug and keeps its traceback in the run's log.
"""

from __future__ import annotations

DIVERGED = "training diverged"
"""How the reason begins of a client whose loss is no number any more."""
BUDGET = "the privacy budget is spent"
"""How the reason begins of a client that would spend more than its budget."""
POLICY = "policy of client"
"""How the reason begins of a client whose policy forbids it; then its name, a comma, the clause."""
NO_MEMORY = "there is not enough memory"
"""How the reason begins of a client whose device or machine has no more to give."""
LIFETIME = "lifetime-epsilon"
"""The clause that bounds all that a client's data may ever spend."""


class FedGraftError(Exception):
    """A run that failed for a reason its user can act on.

    Args:
        message: what is wrong, naming the thing and the value found.
        remedy: what to do about it, as an imperative sentence.
    """

    exit_status = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)  # both, so that it survives pickling
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class ConfigError(FedGraftError):
    """A configuration or a command line that cannot be honoured."""

    exit_status = 2


class DataError(FedGraftError):
    """A data file or folder that cannot be read as its task needs it."""

    exit_status = 2


class ModelError(FedGraftError):
    """A base model, or its adapter, that cannot be loaded or attached."""

    exit_status = 2


class UpdateError(FedGraftError):
    """A client's update that was refused; the message names the client and the tensor."""


class RunError(FedGraftError):
    """A federation that could not go on (too few clients, a full disk, a damaged checkpoint)."""


class PrivacyError(FedGraftError):
    """A privacy guarantee that cannot be given."""


class PolicyError(FedGraftError):
    """A request that a client's own policy forbids; the message names client and clause."""


class StoppedError(Exception):
    """Work that was given up since nobody waits for its result any more."""


class LedgerError(PrivacyError):
    """A privacy ledger that is damaged, cut short or missing; it is never read as an empty one."""


class BudgetSpentError(RunError):
    """A round without enough updates, for no other reason than that budgets are spent."""


class DiskFullError(RunError):
    """The disk of this process is full: where client and server share it, the run cannot go on."""
