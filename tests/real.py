"""Tiny random models of several families with the processors that transformers has for them: tokenizers trained on the spot, pictures
of any size, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from transformers import GenerationConfig, PreTrainedTokenizerFast

import mmn
from mmn import families

# How the templates of released checkpoints write a conversation, without their tools and thoughts.
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# Families that transformers has a processor for that needs nothing but a tokenizer and pictures, each of another kind.
NAMES = ("llava", "instructblip", "blip-2", "paligemma", "gemma3", "idefics3", "llava_next", "mllama", "idefics")


def _tokenizer(style: str, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """One whose special tokens have the ids that mmn.families gives them: 3 is the picture's."""
    fast = tiny.tokenizer(style, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def processor(family: str) -> Any:
    """A processor of a family, for the model that mmn.families builds of it."""
    side = {"height": 32, "width": 32}
    if family in ("llava", "llava_next"):
        more = {"image_grid_pinpoints": [[32, 64], [64, 32]], "crop_size": side} if family == "llava_next" else {"crop_size": side}
        kind = hf.LlavaNextImageProcessorPil if family == "llava_next" else hf.CLIPImageProcessorPil
        images = kind(size={"shortest_edge": 32}, **more)
        words = _tokenizer("pieces", "<image>")
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        kind = hf.LlavaNextProcessor if family == "llava_next" else hf.LlavaProcessor
        return kind(images, words, chat_template=tiny.TEMPLATE, **options)
    if family in ("instructblip", "blip-2"):
        words, images = _tokenizer("pieces", "<image>"), hf.BlipImageProcessorPil(size=side)
        if family == "blip-2":
            return hf.Blip2Processor(images, words, num_query_tokens=4)
        return hf.InstructBlipProcessor(images, words, _tokenizer("unigram"), num_query_tokens=4)
    if family == "paligemma":
        images = hf.SiglipImageProcessorPil(size=side)
        images.image_seq_length = 16
        return hf.PaliGemmaProcessor(images, _tokenizer("plain", "<image>"))
    if family == "gemma3":
        marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        words = _tokenizer("plain", *marks.values(), "<start_of_turn>", "<end_of_turn>", **marks)
        images = hf.Gemma3ImageProcessorPil(size=side)
        return hf.Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=4)
    if family == "mllama":
        words = _tokenizer("spaced", "<|image|>", "<|im_start|>", "<|im_end|>", image_token="<|image|>")
        images = hf.MllamaImageProcessorPil(size=side, max_image_tiles=4)
        return hf.MllamaProcessor(images, words, chat_template=CHATML)
    special = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>")
    if family == "idefics3":
        images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        return hf.Idefics3Processor(images, _tokenizer("spaced", *special), image_seq_len=4, chat_template=IDEFICS)
    return hf.IdeficsProcessor(hf.IdeficsImageProcessorPil(image_size=32), _tokenizer("pieces", *special), image_size=32)


def parts(family: str) -> tuple[Any, Any]:
    """A tiny model of a family and its processor."""
    words = processor(family)
    model = families.build(family)
    model.resize_token_embeddings(max(len(words.tokenizer), families.WORDS))
    tiny.randomise(model, std=0.2)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model.requires_grad_(False), words


def vlm(family: str) -> mmn.VLM:
    """The same as a VLM; whatever it says is a noun, since the text is nonsense."""
    return mmn.VLM(*parts(family), family, lexicon=tiny.every_word)


def save(family: str, folder: Path) -> Path:
    """A checkpoint of a family whose model says nothing but a few whole words, in an order of its own."""
    model, processor = parts(family)
    pieces = processor.tokenizer.convert_ids_to_tokens(list(range(len(processor.tokenizer))))
    silent = torch.tensor([piece[0] + "cat" not in ("\u0120cat", "\u2581cat") or len(piece) < 4 for piece in pieces])
    model.get_output_embeddings().weight.data[: len(pieces)][silent] *= 0.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
