"""A checkpoint of the miniature of mPLUG-Owl2, as one would come from the Hub: weights, and the code that builds the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

HERE = Path(__file__).parent
AUTO = {
    "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
    "AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM",
}


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """Write a random checkpoint into a folder."""
    from mplug_owl2.configuration_mplug_owl2 import MPLUGOwl2Config
    from mplug_owl2.modeling_mplug_owl2 import MPLUGOwl2LlamaForCausalLM

    config = MPLUGOwl2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = MPLUGOwl2LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw) * 0.2
        parameter.data = noise + 1 if parameter.ndim == 1 and "bias" not in name else noise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    for code in HERE.glob("*_mplug_owl2.py"):
        shutil.copy(code, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": AUTO}, indent=1))
    return folder
