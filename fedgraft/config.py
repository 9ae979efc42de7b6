"""One typed config for every command: the same keys in a TOML file, in `--set` and on the wire.

Keys are written as in the documentation, `federation.min-clients`; in code the same value is
`config.federation.min_clients`. Unknown keys and wrong types are refused with the nearest valid
key. The defaults run: the digits task, six clients, FedAvg.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedgraft.config_errors import config_error
from fedgraft.settings import parse_settings, put, read_toml, unflatten

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
RUN_CONFIG_KEY = "fedgraft.config"
"""The one key under which a resolved config travels as JSON in Flower's run config."""
RECORDED = ("run", "versions")
"""Tables of a run directory's config.toml that are a record of the run and not its config."""


def _kebab(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _list_or_by_memory(value: Any) -> Any:
    if isinstance(value, str) and value != "by-memory":
        raise ValueError(
            f'federation.ranks is {value!r}, and may be a list like [8, 4, 2] or "by-memory"'
        )
    return value


def _names_or_expression(value: Any) -> Any:
    if value is not None and not isinstance(value, list | str):
        raise ValueError(
            f'adapter.targets is {value!r}, and may be "all-linear", a list of names like '
            '["q_proj", "v_proj"], or a regular expression that whole names match'
        )
    return value


class Group(BaseModel):
    """A group of keys: written with dashes, frozen, and strict about unknown keys and types."""

    model_config = ConfigDict(
        alias_generator=_kebab,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )


class TaskConfig(Group):
    """`[task]`: what is trained on what."""

    name: str = "digits"
    data: str | None = None  # a file, a folder or a Hub dataset's id; digits brings its own
    text_field: str = "text"
    label_field: str = "label"
    template: str | None = None  # causal-lm: "Question: {question}\nAnswer: {answer}"
    max_length: Positive = 256  # tokens
    samples: Positive | None = None  # at most so many training examples; all when unset


class ModelConfig(Group):
    """`[model]`: the frozen base, and where it runs."""

    base: str | None = None  # a Hub id or a local folder; digits brings its own
    revision: str | None = None
    offline: bool = False  # read the Hub's local cache only
    quantization: Literal["none", "int8", "nf4"] = "none"  # by bitsandbytes, on CPU and CUDA
    double_quantization: bool = True  # nf4: the scales of its blocks are quantised, too
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # stored and computed in
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None  # the base's own
    gradient_checkpointing: bool = False  # less memory for activations, a third more time


class AdapterConfig(Group):
    """`[adapter]`: what is trained and travels."""

    type: Literal["lora", "rslora", "dora"] = "lora"
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    rank_pattern: dict[str, Positive] | None = None  # by a layer's name or a regular expression
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    # "all-linear", or what whole names match; None: the task's own choice
    targets: Annotated[list[str] | str | None, BeforeValidator(_names_or_expression)] = None
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    from_: str | None = Field(None, alias="from")  # an adapter folder to start from

    @model_validator(mode="after")
    def _one_start(self) -> AdapterConfig:
        if self.from_ is not None and self.init != "default":
            raise ValueError(
                f'adapter.init is "{self.init}" and adapter.from names an adapter to start from: '
                "set one of them"
            )
        if self.init in ("pissa", "olora") and self.type == "dora":
            raise ValueError(
                f'adapter.init is "{self.init}", which takes a part of the base out, and the norm '
                'of adapter.type "dora" is that of the whole: set one of them to another value'
            )
        if self.init in ("pissa", "olora") and self.dropout:
            raise ValueError(
                f'adapter.init is "{self.init}", whose factors hold a part of the base, and '
                f"adapter.dropout {self.dropout:g} would drop it in training: set it to 0"
            )
        if self.init == "orthogonal":
            for rank in (self.rank, *(self.rank_pattern or {}).values()):
                if rank % 2:
                    raise ValueError(
                        f'adapter.init is "orthogonal", which needs even ranks, and one is {rank}'
                    )
        return self

    @property
    def starts_at_zero(self) -> bool:
        """Whether the run starts from B = 0 and an A that its seed determines, bit for bit."""
        return self.from_ is None and self.init in ("default", "gaussian")

    @property
    def patterned(self) -> bool:
        """Whether layers may have ranks or alphas of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def scaling(self) -> float:
        """The scaling of the whole rank; see `scaling_at`."""
        return self.scaling_at(self.rank)

    def scaling_at(self, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rslora (Kalajdzievski 2023, arXiv:2312.03732).

        Of layers that no pattern gives a rank or an alpha of their own.
        """
        return self.alpha / (rank**0.5 if self.type == "rslora" else rank)


class FederationConfig(Group):
    """`[federation]`: who takes part, for how long, and who holds which data."""

    clients: Positive = 6
    fraction: Fraction = 1.0  # of the clients, sampled each round
    # poisson: each client by itself with probability `fraction`, as amplification assumes
    sampling: Literal["fixed", "poisson"] = "fixed"
    min_clients: Positive = 1  # fewer valid updates than this end the run
    deadline: Annotated[float, Field(gt=0.0)] = 3600.0  # seconds to wait for a round's replies
    rounds: Positive = 40
    partition: Literal["iid", "dirichlet", "shards", "domain", "natural"] | None = None
    concentration: Annotated[float, Field(gt=0.0)] = 0.5  # Dirichlet's alpha: small is skewed
    partition_column: str | None = None
    ranks: Annotated[
        list[Positive] | Literal["by-memory"] | None, BeforeValidator(_list_or_by_memory)
    ] = None  # one a client; all adapter.rank when unset


class TrainConfig(Group):
    """`[train]`: what a client does in a round."""

    steps: Positive | None = None  # optimizer steps a round; 5 when neither it nor epochs is set
    epochs: Annotated[float, Field(gt=0.0)] | None = None  # passes over the client's data a round
    batch_size: Positive = 25
    micro_batch: Positive | None = None  # examples a forward pass; the whole batch when unset
    lr: Annotated[float, Field(gt=0.0)] = 8e-3
    lr_ratio: Annotated[float, Field(gt=0.0)] = 1.0  # B's learning rate over A's (LoRA+)
    optimizer: Literal["adamw", "sgd", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    optimizer_state: Literal["reset", "keep"] = "reset"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # sgd only
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # over the whole run
    proximal_mu: Annotated[float, Field(ge=0.0)] = 0.0  # FedProx's mu; 0 switches it off
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0  # global norm; 0 switches it off
    loss: Literal["response", "all"] = "response"  # causal-lm: which tokens count
    packing: bool = False  # causal-lm: rows laid end to end in sequences of task.max-length

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs exclude each other: set one of them")
        if self.optimizer not in ("adamw", "sgd") and self.optimizer_state == "keep":
            raise ValueError(
                f"train.optimizer-state is keep, and the state of {self.optimizer} cannot be kept"
            )
        return self

    def steps_for(self, examples: int) -> int:
        """Return how many optimizer steps a client with so many examples takes in a round."""
        if self.epochs is not None:
            return max(1, round(self.epochs * examples / self.batch_size))
        return self.steps or 5

    @property
    def rates(self) -> dict[str, float]:
        """What factors' learning rates are multiplied by; empty where all are `lr`."""
        return {} if self.lr_ratio == 1.0 else {"B": self.lr_ratio}


class StrategyConfig(Group):
    """`strategy.name`, and the options of that rule, which the rule itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "fedavg"

    @property
    def options(self) -> dict[str, Any]:
        """The keys of `[strategy]` beside the name."""
        return dict(self.model_extra or {})


class EvaluateConfig(Group):
    """`[evaluate]`: when the validation split is looked at, and when it ends the run."""

    every: Positive = 1  # rounds
    fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # cut off where no file is given
    samples: Positive | None = None  # of validation, and of test, at most; all when unset
    clients: bool = True  # every client reports the global adapter's metric on its own validation
    batch_size: Positive | None = None  # examples a forward pass; the task's own when unset
    patience: Positive | None = None  # evaluations without a better one before stopping early
    metric: str | None = None  # the one that is watched, among the task's; its own when unset
    answers: Literal["exact-match", "rouge-l"] | None = None  # causal-lm: how they are scored
    answer_samples: Positive = 100  # rows of a split that are answered, at most
    max_new_tokens: Positive = 256  # of an answer, and of what follows a prompt
    prompts: list[str] | None = None  # continued after each evaluation, for people to read


class PrivacyConfig(Group):
    """`[privacy]`: whose data the run protects, against whom, and by how much noise."""

    mode: Literal["none", "example", "client", "local"] = "none"
    # noise's standard deviation over the clip; or the budget that it is calibrated to
    noise_multiplier: Annotated[float, Field(gt=0.0)] | None = None
    target_epsilon: Annotated[float, Field(gt=0.0)] | None = None
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    clip: Annotated[float, Field(gt=0.0)] = 1.0  # of an example's gradient, or a client's update
    adaptive_clip: bool = False  # client: the clip follows the median of the updates' norms
    accountant: Literal["rdp", "pld"] = "rdp"  # pld: tighter and slower

    @property
    def against_server(self) -> bool:
        """Whether the server is one of those whom the data are protected against.

        Then no client tells it how many examples it has, their labels, or a loss or metric of them.
        """
        return self.mode in ("example", "local")

    @model_validator(mode="after")
    def _one_amount(self) -> PrivacyConfig:
        if self.mode == "none":
            return self
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                f'privacy.mode is "{self.mode}": set one of privacy.noise-multiplier and '
                "privacy.target-epsilon"
            )
        if self.adaptive_clip and self.mode != "client":
            raise ValueError(
                f'privacy.adaptive-clip works under privacy.mode "client", and it is "{self.mode}"'
            )
        return self


class CheckpointConfig(Group):
    """`[checkpoint]`: what a resume can continue from."""

    every: Positive = 1  # rounds
    keep: Positive = 2


class TrackConfig(Group):
    """`[track]`: where else the numbers go."""

    tensorboard: bool = False


class Config(Group):
    """Everything that a run is a function of."""

    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    federation: FederationConfig = FederationConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Positive | None = None  # torch's threads; chosen by the model's size when unset
    compare: dict[str, dict[str, Any]] = {}  # [compare.<strategy>]: keys set for it alone

    @model_validator(mode="after")
    def _enough_clients(self) -> Config:
        if self.federation.min_clients > self.federation.clients:
            raise ValueError(
                f"federation.min-clients is {self.federation.min_clients}, more than "
                f"federation.clients ({self.federation.clients})"
            )
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """Return the config with dotted keys replaced, checked anew."""
        tree = self.to_dict()
        for key, value in overrides.items():
            put(tree, key, value)
        return Config.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain nested values under its written keys, unset ones left out."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")

    def to_toml(self) -> str:
        """Return what `load` reads back."""
        return tomli_w.dumps(self.to_dict())

    def to_json(self) -> str:
        """Return the config as it travels: JSON with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "") -> Config:
        """Check a tree of written keys.

        Raises:
            ConfigError: an unknown key (the nearest valid one is named), a wrong type or value.
        """
        try:
            return cls.model_validate(unflatten(tree))
        except ValidationError as error:
            raise config_error(error, known_keys(), source) from None

    @classmethod
    def load(cls, path: Path | None = None, settings: Iterable[str] = ()) -> Config:
        """Read a TOML file (or the defaults) and apply `key=value` settings on top.

        The file may be a run's own config.toml: what it records beside the config is passed over.

        Raises:
            ConfigError: the file is missing or no TOML, or `from_dict` refuses what it holds.
        """
        tree: dict[str, Any] = {}
        if path is not None:
            tree = read_toml(path)
            for table in RECORDED:
                tree.pop(table, None)
        for key, value in parse_settings(settings).items():
            put(tree, key, value)
        return cls.from_dict(tree, source=str(path) if path else "")

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Config:
        """Read the config that travelled in Flower's run config: JSON, or scalar dotted keys."""
        text = run_config.get(RUN_CONFIG_KEY)
        if text:
            return _from_json(str(text))
        scalars = {key: v for key, v in run_config.items() if not key.startswith("fedgraft.")}
        return cls.from_dict(scalars, source="[tool.flwr.app.config]")


@lru_cache(maxsize=8)
def _from_json(text: str) -> Config:
    """Parse a config once and not with every message that it travels with."""
    return Config.from_dict(json.loads(text))


def known_keys(config: type[Group] = Config) -> list[str]:
    """Return every key of a config as users write it."""
    keys: list[str] = []
    for name, field in config.model_fields.items():
        written = field.alias or _kebab(name)
        group = field.annotation
        if isinstance(group, type) and issubclass(group, Group):
            keys += [
                f"{written}.{inner.alias or _kebab(key)}"
                for key, inner in group.model_fields.items()
            ]
        else:
            keys.append(written)
    return keys
