"""Configuration of the miniature of mPLUG-Owl2: Llama's, and beside it how wide and deep the visual parts are."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class MPLUGOwl2Config(LlamaConfig):
    """visual_config: `image_size`, `patch_size`, `hidden_size`, `heads`, `layers` and `queries` of the visual parts."""

    model_type = "mplug_owl2"

    def __init__(self, visual_config: dict[str, int] | None = None, **options: Any):
        small = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "heads": 2, "layers": 2, "queries": 4}
        self.visual_config = small | (visual_config or {})
        super().__init__(**options)
