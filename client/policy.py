"""The client's policy: what its owner lets a run do, in a file that no server can override.

Every clause that is left out allows anything. A request that breaks a clause is refused before any
data are read, in words that name client and clause. What a clause cannot see beforehand (noise that
a run fits to its budget, what a round adds to the lifetime's epsilon) is checked where the client
pays for the round, before anything is trained (`fedgraft.privacy.limits`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedgraft.config import Config, Group, Positive, known_keys
from fedgraft.config_errors import config_error
from fedgraft.errors import LIFETIME, POLICY, ConfigError, PolicyError, RunError
from fedgraft.files import write_text
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.limits import Limits
from fedgraft.settings import read_toml, unflatten

MODES = ("none", "client", "example", "local")
"""Of `privacy.mode`, the weakest first. Under "client" the server adds the noise, and the client
has its word for it; "example" hides each example from the server, "local" all that a client has."""
EXAMPLES, DESCRIPTION, MEMORY = "num-examples", "description", "memory"
"""What may leave beside a round's metrics: how many examples there are, of which labels or domain
they are, and how much memory the machine has."""
DAY = 24 * 3600.0
_HASH = re.compile(r"[0-9a-f]{64}")

EXAMPLE = """\
# What this client's owner lets a run do. No server can override it, and a change counts from the
# next request on. A clause that is left out allows anything.

# The weakest privacy.mode: "none", "client" (the server adds the noise), "example" or "local".
privacy-mode = "none"

# The smallest noise multiplier (the noise's standard deviation over the clip), the largest clip.
# noise-multiplier = 0.8
# largest-clip = 1.0

# All that these data may ever spend, over all runs, as the privacy ledger counts it. Runs whose
# cost this client cannot count (modes "none" and "client") are then refused.
# lifetime-epsilon = 8.0
# delta = 1e-5

# Bases by their hash, as `fedgraft doctor --client ... --against CONFIG.toml` names it.
{bases}

tasks = [{task}]
adapter-types = ["lora", "rslora", "dora"]
largest-rank = 64
rounds-per-day = 1000  # trainings begun within any 24 hours

# What may leave beside the adapter. "num-examples": without it the client counts as one example;
# "description": labels or domain of its data; "memory": of its machine; "epsilon", "epsilon-left":
# what the data have spent, and what is left of lifetime-epsilon.
metrics = ["loss", "steps", "seconds", "accuracy", "examples", "num-examples",
  "epsilon", "epsilon-left"]
"""


class Policy(Group):
    """The clauses of policy.toml."""

    privacy_mode: Literal["none", "client", "example", "local"] = "none"
    noise_multiplier: Annotated[float, Field(gt=0.0)] | None = None
    largest_clip: Annotated[float, Field(gt=0.0)] | None = None
    lifetime_epsilon: Annotated[float, Field(gt=0.0)] | None = None
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5  # of lifetime-epsilon
    bases: list[str] | None = None
    tasks: list[str] | None = None
    adapter_types: list[str] | None = None
    largest_rank: Positive | None = None
    rounds_per_day: Positive | None = None
    metrics: list[str] | None = None

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read policy.toml.

        Raises:
            ConfigError: no such file, no TOML, an unknown clause (the nearest one is named), a
                wrong type or value.
        """
        try:
            policy = cls.model_validate(unflatten(read_toml(path)))
        except ValidationError as error:
            raise config_error(error, known_keys(cls), str(path), option=False) from None
        for base in policy.bases or ():
            if not _HASH.fullmatch(base):
                raise ConfigError(
                    f"clause bases in {path} holds {base!r}, which is no hash of a base",
                    "Write 64 digits from 0 to f, as `fedgraft doctor` with --against names them.",
                )
        return policy

    def allows(self, what: str) -> bool:
        """Whether a metric, or one of EXAMPLES, DESCRIPTION and MEMORY, may leave."""
        return self.metrics is None or what in self.metrics

    def limits(self, client: str) -> Limits:
        """Return what is checked where a round is paid for."""
        return Limits(client, self.noise_multiplier or 0.0, self.lifetime_epsilon, self.delta)

    def check_run(self, client: str, config: Config) -> None:
        """Check a run's config.

        Args:
            client: the client's name, for the refusal.
            config: as the server sent it.

        Raises:
            PolicyError: it breaks a clause.
        """
        privacy, adapter = config.privacy, config.adapter
        say = _Refusals(client)
        if MODES.index(privacy.mode) < MODES.index(self.privacy_mode):
            say.refuse(
                "privacy-mode",
                f'the run\'s privacy.mode is "{privacy.mode}", and at least '
                f'"{self.privacy_mode}" is wanted',
            )
        if self.noise_multiplier is not None:
            if privacy.mode == "none":
                say.refuse("noise-multiplier", "the run adds no noise")
            if privacy.noise_multiplier is not None:
                self.limits(client).check_noise(privacy.noise_multiplier)
        if self.largest_clip is not None:
            if privacy.mode == "none":
                say.refuse("largest-clip", "the run clips nothing")
            if privacy.clip > self.largest_clip:
                say.refuse(
                    "largest-clip",
                    f"privacy.clip is {privacy.clip:g}, and at most {self.largest_clip:g} is "
                    "allowed",
                )
        if self.lifetime_epsilon is not None and not privacy.against_server:
            say.refuse(
                LIFETIME,
                f'the run\'s privacy.mode is "{privacy.mode}", whose cost no ledger here counts',
            )
        say.unless_listed("tasks", "task.name", config.task.name, self.tasks)
        say.unless_listed("adapter-types", "adapter.type", adapter.type, self.adapter_types)
        ranks = config.federation.ranks
        listed = ranks if isinstance(ranks, list) else []
        largest = max([adapter.rank, *(adapter.rank_pattern or {}).values(), *listed])
        if self.largest_rank is not None and largest > self.largest_rank:
            say.refuse(
                "largest-rank",
                f"the adapter's largest rank is {largest}, and at most {self.largest_rank} is "
                "allowed",
            )

    def check_base(self, client: str, base_hash: str) -> None:
        """Check the base that a request names; "" where it names none.

        Raises:
            PolicyError: it is not on the list.
        """
        if self.bases is None:
            return
        if not base_hash:
            _Refusals(client).refuse("bases", "the request does not say which base it is for")
        if base_hash not in self.bases:
            _Refusals(client).refuse("bases", f"the base {base_hash[:12]} is not on its list")

    def check_budget(self, client: str, ledger: Path) -> None:
        """Check that anything is left of the lifetime's epsilon.

        Raises:
            PolicyError: nothing is.
            LedgerError: the ledger is damaged.
        """
        if self.lifetime_epsilon is not None:
            self.limits(client).check_lifetime(Ledger(ledger))


@dataclass(frozen=True)
class RoundsBegun:
    """When trainings began, within a day, in a file that outlives the process.

    Attributes:
        path: the file.
        clock: seconds since 1970.
    """

    path: Path
    clock: Callable[[], float] = time.time

    def begin(self, client: str, most: int | None) -> None:
        """Count a training that is about to begin.

        Args:
            client: the client's name, for the refusal.
            most: how many may begin within a day; None for any number.

        Raises:
            PolicyError: so many have begun already.
            RunError: the file is damaged, or cannot be written.
        """
        now = self.clock()
        # One from the future would count for ever: the clock has been put back, and it is of now.
        recent = [min(at, now) for at in self._read() if at > now - DAY]
        if most is not None and len(recent) >= most:
            hours = (recent[-most] + DAY - now) / 3600
            _Refusals(client).refuse(
                "rounds-per-day",
                f"{len(recent)} rounds have begun within a day, and {most} are allowed; the next "
                f"may begin in {hours:.1f} hours",
            )
        write_text(self.path, dumps([*recent, now]) + "\n")

    def _read(self) -> list[float]:
        if not self.path.exists():
            return []
        try:
            return [float(at) for at in loads(self.path.read_text())]
        except (JSONDecodeError, TypeError, ValueError):
            raise RunError(
                f"{self.path}, which counts the rounds of a day, is damaged",
                "Delete it; the count then starts anew.",
            ) from None


@dataclass(frozen=True)
class _Refusals:
    client: str

    def refuse(self, clause: str, why: str) -> None:
        raise PolicyError(f"{POLICY} {self.client}, {clause}: {why}")

    def unless_listed(self, clause: str, key: str, found: str, allowed: list[str] | None) -> None:
        if allowed is not None and found not in allowed:
            self.refuse(clause, f'the run\'s {key} is "{found}", which is not on its list')
