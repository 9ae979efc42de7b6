"""A PEFT folder: the files that `PeftModel.from_pretrained` reads, and the card beside them."""

from __future__ import annotations

WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
