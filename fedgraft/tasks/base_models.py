"""Base models from a local folder or the Hub: loaded quietly, or refused in one sentence.

Weights that a base does not bring (a new classification head) are drawn from a fixed named stream
and not from torch's, so every machine holds the same base. Only safetensors are read, and code
that a repository brings is never run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fedgraft import quantization
from fedgraft.adapter import natural_order
from fedgraft.config import Config
from fedgraft.devices import pick_device
from fedgraft.errors import ConfigError, ModelError
from fedgraft.seeds import stream
from fedgraft.tasks.hub import local_path, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NEW_WEIGHT_SD = 0.02
"""Standard deviation of new weights: BERT's (Devlin et al. 2019), and transformers' own default."""

_WANTED = (
    "A base holds config.json, model.safetensors and a tokenizer, as save_pretrained writes them."
)
_Loaded = TypeVar("_Loaded")


def load_model(
    auto_class: Any, config: Config, *, heads: Sequence[str] = (), **options: Any
) -> nn.Module:
    """Load the base that `model.base` names, in `model.dtype`, in eval mode.

    It lies on the CPU; with `model.quantization` on `model.device`, all but the layers that stay as
    they are quantised, which the log names.

    Args:
        auto_class: one of transformers' auto classes, `AutoModelForCausalLM` say.
        config: its `model` group: a local folder, or a Hub id with `model.revision`.
        heads: modules that may be of another shape than the base's own (a head for other
            classes); they are then drawn anew.
        options: more arguments for `from_pretrained`, `id2label` say.

    Raises:
        ConfigError: `model.base` is not set.
        ModelError: the folder is not there, the Hub id cannot be fetched, or it holds no model of
            this kind in safetensors.
    """
    quantised = config.model.quantization != "none"
    if quantised:
        device = pick_device(config.model.device)
        quantization.check_device(config.model, device)
        structure = structure_of(auto_class, config)
        left = quantization.unquantised_modules(structure, heads)
        if text := quantization.left_as_they_are(left):
            log.info("%s", text)
        options = options | quantization.loading_options(config.model, device, left)
    if config.model.attention is not None:
        options = options | {"attn_implementation": config.model.attention}

    def load(source: str, revision: str | None) -> tuple[nn.Module, dict[str, Any]]:
        loaded: tuple[nn.Module, dict[str, Any]] = auto_class.from_pretrained(
            source,
            revision=revision or "main",
            dtype=getattr(torch, config.model.dtype),
            use_safetensors=True,
            local_files_only=config.model.offline,
            trust_remote_code=False,
            ignore_mismatched_sizes=bool(heads),
            output_loading_info=True,
            **options,
        )
        return loaded

    model, info = _load(config, load)
    reshaped = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    absent = (set(info["missing_keys"]) | reshaped) & {name for name, _ in model.named_parameters()}
    foreign = {name for name in reshaped if not name.startswith(tuple(f"{h}." for h in heads))}
    if foreign or len(absent) > sum(1 for _ in model.parameters()) / 2:
        raise ModelError(
            f"the weights of model.base {config.model.base!r} do not fit its config.json: "
            f"{min(foreign or absent, key=natural_order)} is absent or of another shape",
            "Download or save the base again.",
        )
    draw_new_weights(model, absent)
    if quantised:
        quantization.keep_weights_as_stored(model)
        quantization.remember_source(model, quantization.digest_files(weight_files(config)))
    return model.eval()


def weight_files(config: Config) -> list[Path]:
    """Return the safetensors files of the base; raises as `load_model` does."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    def find(source: str, revision: str | None) -> list[Path]:
        def file(name: str, *, must: bool = True) -> str | None:
            found: str | None = cached_file(
                source,
                name,
                revision=revision or "main",
                local_files_only=config.model.offline,
                _raise_exceptions_for_missing_entries=must,
            )
            return found

        if (whole := file(SAFE_WEIGHTS_NAME, must=False)) is not None:  # which is loaded first
            return [Path(whole)]
        index = Path(file(SAFE_WEIGHTS_INDEX_NAME) or "")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [Path(path) for path in map(file, names) if path is not None]

    return _load(config, find)


def load_config(config: Config) -> PreTrainedConfig:
    """Load the config of the base; raises as `load_model` does."""
    from transformers import AutoConfig

    base: PreTrainedConfig = _load(
        config,
        lambda source, revision: AutoConfig.from_pretrained(
            source,
            revision=revision or "main",
            local_files_only=config.model.offline,
            trust_remote_code=False,
        ),
    )
    return base


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base; raises as `load_model` does, and where there is none."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(
        config,
        lambda source, revision: AutoTokenizer.from_pretrained(
            source,
            revision=revision or "main",
            local_files_only=config.model.offline,
            trust_remote_code=False,
        ),
    )
    # Where its files are missing transformers makes up a tokenizer that knows no word.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(f"model.base {config.model.base!r} brings no tokenizer", _WANTED)
    return tokenizer


def load_image_processor(config: Config) -> Any:
    """Load the image processor of the base; None where it brings none."""
    from transformers import AutoImageProcessor

    folder = local_path(config.model.base or "")
    if folder is not None and not (folder / "preprocessor_config.json").exists():
        return None
    processor: Any = AutoImageProcessor
    return _load(
        config,
        lambda source, revision: processor.from_pretrained(
            source,
            revision=revision or "main",
            local_files_only=config.model.offline,
            trust_remote_code=False,
        ),
    )


def head_modules(auto_class: Any, base: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the modules that a model of this kind puts on top of its backbone.

    They are read from the model's structure, built without weights: `classifier`, `score`,
    `pre_classifier`, whatever the architecture calls them.

    Raises:
        ModelError: the architecture has no model of this kind.
    """
    model: Any = _without_weights(auto_class, base)
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


def structure_of(auto_class: Any, config: Config, **options: Any) -> nn.Module:
    """Return the modules of the base in `model.dtype`, without their weights.

    Args:
        auto_class: as for `load_model`.
        config: as for `load_model`.
        options: changes to the base's own config, `num_labels` say.

    Raises:
        ModelError: as `load_model`, or the architecture has no model of this kind.
    """
    base = load_config(config)
    base.update(options)
    attention = {"attn_implementation": config.model.attention} if config.model.attention else {}
    dtype = getattr(torch, config.model.dtype)
    return _without_weights(auto_class, base, dtype=dtype, **attention)


def _without_weights(auto_class: Any, base: PreTrainedConfig, **options: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(base, **options)
    except ValueError as error:
        raise ModelError(
            f"there is no {auto_class.__name__} for a base of type {base.model_type!r}",
            "Choose a base whose architecture has one.",
        ) from error
    except ImportError as error:
        raise ModelError(
            f"the base's attention cannot be used here: {reason(error)[0]}",
            "Leave model.attention out, or install what is missing.",
        ) from error
    return model


def draw_new_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Fill the named tensors in place, the same on every machine.

    Matrices are drawn from Normal(0, 0.02), each from its own stream; biases become 0, and other
    vectors (the gains of a normalisation) 1.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    new = sorted(names, key=natural_order)
    with torch.no_grad():
        for name in new:
            tensor = tensors[name]
            if tensor.ndim >= 2:
                draws = stream(0, "new-weights", client=name).normal(
                    0.0, NEW_WEIGHT_SD, tensor.shape
                )
                tensor.copy_(torch.from_numpy(draws))
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    if new:
        log.info("the base brings no weights for %s: drawn anew", ", ".join(new))


def _load(config: Config, load: Callable[[str, str | None], _Loaded]) -> _Loaded:
    """Resolve `model.base`, load, and turn what goes wrong into one sentence."""
    base = config.model.base
    if base is None:
        raise ConfigError(
            f"task {config.task.name} needs a base model, and model.base is not set",
            "Set model.base to a Hugging Face model folder or Hub id.",
        )
    folder = local_path(base)
    if folder is not None:
        _check_folder(base, folder)
    try:
        return load(str(folder or base), None if folder else config.model.revision)
    except Exception as error:  # transformers raises nearly every kind for a base it cannot load
        if isinstance(error, MemoryError):
            raise
        why, remedy = reason(error)
        kind = "cannot" if folder else "is no local folder, and as a Hub id it cannot"
        raise ModelError(
            f"model.base {base!r} {kind} be loaded: {why}", remedy or _WANTED
        ) from error


def _check_folder(base: str, folder: Path) -> None:
    """Refuse what transformers would answer with a page of text."""
    if not folder.is_dir():
        state = (
            "which is a file, not a folder" if folder.exists() else "and that folder is not there"
        )
        raise ModelError(
            f"model.base is {base!r}, {state}",
            "Check the path, or name a Hub id such as owner/name.",
        )
    path = folder / "config.json"
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"model.base is {base!r}, and that folder holds no config.json",
            _WANTED,
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", "Download the base again.") from None
