"""Tiny random Hugging Face folders for tests: the real architectures, a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.seeds import forked_torch

SHARED = Path(__file__).parents[4] / "shared"
_WORDS = (
    "Question Answer : ? a bad good film very dull fine the was it how many is two three one plus "
    "do say hello bye"
)


def shared(name: str) -> Path:
    """Return a path beside the repository, or skip the test."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def save_tokenizer(folder: Path, *, pad: bool = True, begin: bool = True) -> None:
    """Save a tokenizer of whole words; `[unk]` for those it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[pad]", "[unk]", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *_WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    names = {"unk_token": "[unk]", "bos_token": "<s>", "eos_token": "</s>"}
    if pad:
        names["pad_token"] = "[pad]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_model(folder: Path, auto_class: Any, base: Any) -> Path:
    """Save a random model of this config."""
    with forked_torch(0, torch.device("cpu")):
        auto_class.from_config(base).save_pretrained(folder)
    return folder


def save_bert(folder: Path, **settings: Any) -> Path:
    """Save a BERT without a classification head, and its tokenizer."""
    from transformers import AutoModel, BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertConfig(
        **sizes, intermediate_size=24, vocab_size=40, max_position_embeddings=64, **settings
    )
    save_tokenizer(folder)
    return save_model(folder, AutoModel, base)


def save_llama(folder: Path, *, pad: bool = True, begin: bool = True, **settings: Any) -> Path:
    """Save a Llama language model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    scale = {"initializer_range": 0.5}  # far from uniform, so that a wrong shift or mask shows
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    base = LlamaConfig(**(sizes | layers | scale | ends | settings))
    save_tokenizer(folder, pad=pad, begin=begin)
    return save_model(folder, AutoModelForCausalLM, base)


def save_vit(folder: Path, **settings: Any) -> Path:
    """Save a ViT (8x8 images unless told otherwise) without a classification head."""
    from transformers import AutoModel, ViTConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"image_size": 8, "patch_size": 4} | settings
    base = ViTConfig(**sizes, intermediate_size=24, **settings)
    return save_model(folder, AutoModel, base)
