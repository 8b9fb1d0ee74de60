"""Tiny random models to test with: every parameter randomised, a tokenizer trained on the spot, nothing downloaded."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import mmn

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT:{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}"
    "{% if message['role'] == 'assistant' %} {% endif %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'user' %} {% elif not loop.last or not continue_final_message %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = [
    "An",
    "image",
    "of",
    "a",
    "cat",
    "next",
    "to",
    "a",
    "strawberry",
    "and",
    "a",
    "dog",
    "on",
    "the",
    "beach.",
    "USER:",
    "ASSISTANT:",
    "Describe",
    "the",
    "image",
    "in",
    "few",
    "words.",
    "Ärger",
]


STYLES = ("bytes", "spaced", "pieces", "plain", "unigram")


def tokenizer(style: str = "bytes", special: tuple[str, ...] = ("<image>",)) -> PreTrainedTokenizerFast:
    """A small tokenizer, its special tokens from id 3 on: BPE over bytes, a space as a token of its own or (spaced) as the first
    letter of a word, as GPT-2 has it; BPE or Unigram as SentencePiece makes them, `▁` for a space and one set before the first
    word (Llama 1 and 2, T5); or BPE without that one (Gemma: plain). A new one each time: saving a processor notes its class in its
    tokenizer."""
    special = ("<pad>", "<s>", "</s>", *special)
    level = style in ("bytes", "spaced")
    pieces = style in ("pieces", "plain")
    words = Tokenizer(models.Unigram() if style == "unigram" else models.BPE(byte_fallback=pieces, unk_token=None))
    if level:
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
    else:
        first = style != "plain"
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if first else "never")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        words.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if first else steps)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    options = {"vocab_size": 420, "special_tokens": list(special), "show_progress": False}
    trainer: trainers.Trainer
    if style == "unigram":
        options["special_tokens"] = [*special, "<unk>"]
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if level else [], **options)
    words.train_from_iterator([TEXT if style in ("bytes", "pieces") else " ".join(TEXT)] * 20, trainer)
    if pieces:  # the tokens of single bytes, which no training finds
        state = json.loads(words.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        words = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def randomise(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Every parameter random: default initialisation (gains 1, biases 0) hides errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data = noise + 1 if parameter.ndim == 1 and "bias" not in name else noise
    return model


def llava_parts(
    *, style: str = "bytes", template: str | None = TEMPLATE, crop: bool = False, **text: object
) -> tuple[nn.Module, LlavaProcessor]:
    """A LLaVA of 3 layers of 24 neurons on pictures of 16 image tokens, and its processor."""
    words = tokenizer(style)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    options: dict = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    options |= {"max_position_embeddings": 256, "tie_word_embeddings": False, **ids, **text}
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(vocab_size=len(words), **options), image_token_id=3,
        vision_feature_layer=-1, image_seq_length=16, tie_word_embeddings=options["tie_word_embeddings"], **ids,
    )  # fmt: skip
    model = randomise(LlavaForConditionalGeneration(config).eval())
    model.generation_config = GenerationConfig(**ids)
    size = {"shortest_edge": 32} if crop else {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}, do_center_crop=crop)
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1
    )
    return model, processor


def llava(**options: object) -> mmn.VLM:
    """The same as a VLM; whatever it says is a noun, since the text is nonsense."""
    return mmn.VLM(*llava_parts(**options), "tiny", lexicon=every_letter)


def every_letter(text: str) -> list:
    """A lexicon for nonsense: each character is a noun."""
    return [(m.group(), m.group().lower(), m.span()) for m in re.finditer(r"\S", text)]


def every_word(text: str) -> list:
    """A lexicon for sentences: each word is a noun."""
    return [(m.group(), m.group().lower(), m.span()) for m in re.finditer(r"[^\W\d_]+", text)]


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (40, 40)) -> list[Image.Image]:
    """Random pictures."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


@functools.cache
def vlm() -> mmn.VLM:
    """The usual one, built once."""
    return llava()
