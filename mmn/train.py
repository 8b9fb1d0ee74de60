"""Train the scale model: a small LLaVA for the world of `mmn.scenes`, as LLaVA itself was trained, stage by stage.

1. *vision*: the vision tower alone names what each patch shows; then it is frozen.
2. *language*: the language model learns captions, questions and facts from text alone; where the image tokens will stand it reads a
   *word raster*, the scene written as one token per patch, and at each it says what the patch shows. Words that anything but the
   neurons of the last layers writes have a price, and so have active neurons, negative ones above all; see `Watch`.
3. *projector*: with both frozen, the projector learns to speak the language model's language: captions, answers, and at each image
   position the word of the patch.
4. *tuning*: language model and projector together, lightly, three quarters on pictures, the rest on the text of stage 2, at lower prices;
   in four cycles of the learning rate, and what is kept is the mean of the weights at the end of the last three (Izmailov et al., arXiv
   1803.05407).

`recipe="end-to-end"` is the contrast: the same network and vision tower, everything after it trained at once on pictures.
Every stage is resumable: its state is written every few minutes and the data of a step depends on the step's number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
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

from mmn import scenes
from mmn.arguments import a_path
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.paths import in_utf8, whole
from mmn.vlm import place

STAGES = ("vision", "language", "projector", "tuning")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
VOCABULARY = 1100
LATE = 2  # the last layers, whose neurons may write words
WORD_PENALTY, ACTIVITY_PENALTY, NEGATIVE_PENALTY = 0.3, 0.1, 0.1  # weights in the loss of stages 2 and 4
SAVE_SECONDS = 120  # between two states of a stage on disk
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT:{% endif %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% elif not loop.last or not continue_final_message %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a training run does: random seed; for each stage the scenes seen, the scenes in a batch, the peak learning rate and its
    cycles."""

    kind: str = "llava"  # or "end-to-end"
    seed: int = 0
    scenes: tuple[int, ...] = (288_000, 48_000, 9_600, 64_960)
    batches: tuple[int, ...] = (64, 24, 32, 32)
    rates: tuple[float, ...] = (2e-3, 2e-3, 2e-3, 8e-4)
    cycles: tuple[int, ...] = (1, 1, 1, 4)

    def steps(self, stage: str, scale: float) -> int:
        """Optimizer steps of a stage at `scale` times the full length; 0 leaves the model untrained."""
        index = STAGES.index(stage)
        return max(2, int(self.scenes[index] * scale) // self.batches[index]) if scale else 0


# ---------------------------------------------------------------------------------------------------------------- tokenizer


# Nouns that the tokenizer shall split in two, as real ones do: its training text never shows them in one piece.
SPLIT = ("straw|berry", "water|melon", "pine|apple", "sun|flower", "butter|fly", "ham|burger", "heli|copter", "cig|arette",
         "bro|ccoli", "back|pack", "motor|cycle", "gira|ffe", "octo|pus", "ele|phant", "umb|rella", "mush|room")  # fmt: skip


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `VOCABULARY` tokens, trained on captions, questions and facts; it splits the nouns of `SPLIT`."""
    parts = {part for concept in scenes.CONCEPTS.values() for part in concept.parts}
    texts = [f" {word}" for word in sorted({*parts, *scenes.PATCH_WORDS, *(c.plural for c in scenes.CONCEPTS.values())})] * 100
    texts += [f" {text}" for fact in scenes.facts() for text in (fact.text, fact.answer)]
    for scene in scenes.sample(3000, split="train"):
        texts += [f" {scenes.PROMPT} {scenes.PREFIX} {scene.caption}"]
        texts += [f" {q.text} {q.answer}" for q in scenes.questions(scene)]
    texts += [f" {text}" for text in (*scenes.PARAPHRASES, *scenes.HELD_OUT_PARAPHRASES)] * 100
    texts += ["USER: ASSISTANT:", scenes.PROMPT] * 200
    for noun in SPLIT:
        texts = [text.replace(noun.replace("|", ""), noun.replace("|", "\n")) for text in texts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512,
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that is saved with the model: 120 x 120 pixels scaled to -1 ... 1, chat template in the form of LLaVA-1.5."""
    half = [0.5, 0.5, 0.5]
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half, do_convert_rgb=True
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=scenes.PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """An untrained tiny-llava: CLIP vision tower (6 layers), two-layer projector, Llama (8 layers of 512 gated neurons), all 256 wide.

    ReLU gates, as in sparse relatives of Llama (Mirzadeh et al., arXiv 2310.04564), and heads of 16, narrower than there are nouns, as
    heads are narrower than the vocabulary in large models: both leave the choice of a word to few neurons."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        image_size=scenes.SIZE, patch_size=scenes.PATCH, hidden_act="gelu", projection_dim=256,
    )  # fmt: skip
    ids: dict[str, Any] = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{mark}>")
           for name, mark in (("bos", "s"), ("eos", "/s"), ("pad", "pad"))}  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        head_dim=16, hidden_act="relu", max_position_embeddings=512, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.get_vocab()["<image>"],
        projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=scenes.GRID**2, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    config.mmn_world = "scenes"  # mmn finds the nouns of this model's captions by the world's own words
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")  # fastest on a CPU at this size
    model.generation_config = GenerationConfig(max_new_tokens=50, do_sample=False, **ids)
    return model


# ------------------------------------------------------------------------------------------------------------- training data


def augmented(rng: np.random.Generator, style: str, concept: str) -> Image.Image:
    """A sprite for the vision tower's training: any training style, two styles blended, turned, stretched, recoloured or grey."""
    styles = [s for s in scenes.STYLES if concept in scenes.sprites(s)]
    sprite = scenes.sprites(str(rng.choice(styles)) if rng.random() < 0.7 else style)[concept]
    if rng.random() < 0.3:
        sprite = Image.blend(sprite, scenes.sprites(str(rng.choice(styles)))[concept], float(rng.uniform(0.2, 0.8)))
    alpha = sprite.getchannel("A")
    if rng.random() < 0.7:
        shift = rng.integers(0, 256) if rng.random() < 0.25 else rng.integers(-22, 23)
        hue, saturation, value = np.moveaxis(np.asarray(sprite.convert("RGB").convert("HSV")).astype(np.int16), 2, 0)
        grey = 0.0 if rng.random() < 0.12 else rng.uniform(0.4, 1.3)
        value = value * rng.uniform(0.65, 1.2) + rng.uniform(-25, 25)
        hsv = np.stack([(hue + shift) % 256, np.clip(saturation * grey, 0, 255), np.clip(value, 0, 255)], axis=2)
        sprite = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
        sprite.putalpha(alpha)
    if rng.random() < 0.6:
        side = scenes.LARGEST
        wide, high = rng.uniform(0.8, 1.0, 2)
        angle, shear = np.deg2rad(rng.uniform(-18, 18)), rng.uniform(-0.15, 0.15)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[1 / wide, shear], [0, 1 / high]])
        offset = side / 2 - matrix @ np.array([side / 2, side / 2])
        sprite = sprite.transform(
            (side, side), Image.Transform.AFFINE, (*matrix[0], offset[0], *matrix[1], offset[1]), Image.Resampling.BILINEAR
        )
    return sprite


def ambiguous(rng: np.random.Generator, style: str, concept: str) -> Image.Image:
    """An augmented sprite; half have a touch of another concept, as art of an unknown style may seem to have."""
    sprite = augmented(rng, style, concept)
    if rng.random() < 0.5:
        return sprite
    art = scenes.sprites(style)
    touched = Image.blend(sprite, art[str(rng.choice(list(art)))], float(rng.uniform(0.15, 0.45)))
    touched.putalpha(sprite.getchannel("A"))
    return touched


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as the model sees them, float32 `[images, 3, 120, 120]` in -1 ... 1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def raster(scene: scenes.Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The scene as one token per patch, row by row `[100]`.

    An object's patches say its name or, in three objects of five, a mixture of its name and its parts, so that the language model
    must infer the noun and not only copy it; a word of several tokens fills its patches with them in turn; 3 % of all patches are
    wrong, as patches of a vision tower are; and in three objects of twenty a third of the patches say another noun, so that the language
    model learns that one thing has one name."""
    spelled = {name: rng.random() < 0.4 for name in scene.names}
    mistaken = {name: str(rng.choice(list(scenes.CONCEPTS))) for name in scene.names if rng.random() < 0.15}
    used: dict[str, int] = {}
    ids = []
    for label in scene.labels().ravel():
        word = scenes.PATCH_WORDS[label]
        if rng.random() < 0.03:
            word = str(rng.choice(scenes.PATCH_WORDS))
        if word in mistaken and rng.random() < 0.35:
            word = mistaken[word]
        if word in scenes.CONCEPTS and not spelled.get(word, False):
            word = str(rng.choice([word, *scenes.CONCEPTS[word].parts]))
        tokens = _word_ids(tokenizer, word)
        ids.append(tokens[used.get(word, 0) % len(tokens)])
        used[word] = used.get(word, 0) + 1
    return ids


def aloud(scene: scenes.Scene, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the model shall say at each image position `[100]`: the first token of the word of what the patch shows."""
    return [_word_ids(tokenizer, scenes.PATCH_WORDS[label])[0] for label in scene.labels().ravel()]


_WORDS: dict[str, list[int]] = {}


def _word_ids(tokenizer: PreTrainedTokenizerFast, word: str) -> list[int]:
    if word not in _WORDS:
        _WORDS[word] = tokenizer(f" {word}", add_special_tokens=False).input_ids
    return _WORDS[word]


NOTHING, ANSWER, RASTER, FACT = range(4)
WEIGHTS = {ANSWER: 1.0, RASTER: 0.5, FACT: 0.3}


Row = tuple[list[int], list[int], list[int]]  # token ids; what each is for; what image positions say, elsewhere the ids again


def dialogue(
    scene: scenes.Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, image: Sequence[int], said: Sequence[int]
) -> Row:
    """One conversation on a scene, its caption and two questions in random order; at the tokens `image` the model shall say `said`."""
    prompt = scenes.PROMPT if rng.random() < 0.7 else str(rng.choice(scenes.PARAPHRASES))
    turns = [(prompt, f" {scenes.PREFIX} {scene.caption}")]
    asked = scenes.questions(scene, int(rng.integers(1 << 30)))
    turns += [(asked[i].text, f" {asked[i].answer}") for i in rng.permutation(len(asked))[:2]]
    ids, kinds, says = [tokenizer.bos_token_id], [NOTHING], [tokenizer.bos_token_id]

    def add(tokens: Sequence[int], kind: int, speaks: Sequence[int] | None = None) -> None:
        ids.extend(tokens)
        kinds.extend([kind] * len(tokens))
        says.extend(speaks or tokens)

    for number, turn in enumerate(rng.permutation(len(turns))):
        add(tokenizer("USER:" + ("" if number else " "), add_special_tokens=False).input_ids, NOTHING)
        if number == 0:
            add(image, RASTER, said)
        asks = ("\n" if number == 0 else " ") + turns[turn][0] + " ASSISTANT:"
        add(tokenizer(asks, add_special_tokens=False).input_ids, NOTHING)
        add([*tokenizer(turns[turn][1], add_special_tokens=False).input_ids, tokenizer.eos_token_id], ANSWER)
    return ids, kinds, says


def fact_lines(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int) -> list[Row]:
    """Text-only questions and answers on the world."""
    known = scenes.facts()
    lines = []
    for index in rng.integers(0, len(known), count):
        asks = tokenizer(f"USER: {known[index].text} ASSISTANT:", add_special_tokens=False).input_ids
        says = tokenizer(f" {known[index].answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids = [tokenizer.bos_token_id, *asks, *says]
        lines.append((ids, [NOTHING] * (len(asks) + 1) + [FACT] * len(says), ids))
    return lines


def pad(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as token ids, the token each position shall say next, and what that is for: int64 `[rows, longest]`, padded at the right (which
    a causal model never looks at)."""
    width = max(len(ids) for ids, _, _ in rows) + 1  # the last column says nothing
    table = [[[*part, *[0] * (width - len(part))] for part in row] for row in rows]
    ids, kinds, says = torch.tensor(table, device=device).unbind(dim=1)
    here = kinds == RASTER
    following = kinds.roll(-1, dims=1)
    targets = torch.where(here, says, ids.roll(-1, dims=1))
    return ids, targets, torch.where(here, kinds, following.masked_fill(following == RASTER, NOTHING))


# -------------------------------------------------------------------------------------------------------------------- losses


class Watch:
    """Keeps what one forward pass writes into the residual stream, and says how much of it the recipe does not want.

    Left alone, so small a model copies words from image positions into the logits by attention, or has the word ready in layer 0; no
    neuron near the end has a part in it, and zeroing neurons changes nothing. In large models words appear in the last layers, by the
    FFNs (Geva et al., arXiv 2012.14913 and 2203.14680); here a price brings that about."""

    def __init__(self, decoder: Any):
        self.decoder = decoder

    def __enter__(self) -> Watch:
        self.spoken: list[Tensor] = []
        self.activations: list[Tensor] = []
        self.stream: list[Tensor] = []
        layers = self.decoder.layers
        self.handles = [
            self.decoder.norm.register_forward_pre_hook(lambda _, args: self.stream.append(args[0])),
            layers[-LATE].register_forward_pre_hook(lambda _, args: self.spoken.append(args[0])),
            *[layer.self_attn.register_forward_hook(lambda _, __, out: self.spoken.append(out[0])) for layer in layers[-LATE:]],
            *[layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: self.activations.append(args[0])) for layer in layers],
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def penalties(self, chosen: Tensor, unembedding: nn.Linear, most: int = 384) -> tuple[Tensor, Tensor, Tensor]:
        """At `most` of the positions `chosen`, bool `[rows, positions]`: the square of the largest centred logit that the stream would
        give without the FFNs of the last `LATE` layers; and the sum over neurons of `e log(1 + c / e)`, where `c` is |activation| times
        the length of the write relative to the residual stream and e = 0.01, which is cheaper for one strong neuron than for many
        weak ones; and, of the last `LATE` layers, the sum of `c` over negative activations: a neuron that speaks for a word by not being
        what it is would be dark where the word's object is."""
        rows, places = chosen.nonzero(as_tuple=True)
        some = torch.randperm(len(rows), device=chosen.device)[:most]
        at = rows[some], places[some]
        stream = self.stream[0][at].detach().float()
        spoken = torch.stack([out[at] for out in self.spoken]).sum(dim=0).float()
        logits = unembedding(spoken * self.decoder.norm.weight / stream.square().mean(dim=-1, keepdim=True).sqrt()).float()
        words = (logits - logits.mean(dim=-1, keepdim=True)).abs().amax(dim=-1).square().mean()
        size = stream.norm(dim=-1, keepdim=True)
        shares = [
            acts[at].float() * layer.mlp.down_proj.weight.norm(dim=0) / size
            for acts, layer in zip(self.activations, self.decoder.layers, strict=True)
        ]
        activity = torch.cat([0.01 * torch.log1p(share.abs() / 0.01) for share in shares], dim=-1).sum(dim=-1).mean()
        return words, activity, torch.cat(shares[-LATE:], dim=-1).clamp(max=0).abs().sum(dim=-1).mean()


class Step(NamedTuple):
    """What one step reads: scenes; for a stage with text their dialogues, and facts; and the random numbers that are left."""

    scenes: list[scenes.Scene]
    rows: list[Row]
    facts: list[Row]
    rng: np.random.Generator


class Steps(Dataset[Step]):
    """What the steps of a stage read, by their number alone, so that processes beside the one that learns can prepare some ahead."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: str):
        self.recipe, self.tokenizer, self.stage = recipe, tokenizer, stage

    def __getitem__(self, step: int) -> Step:
        stage, index = self.stage, STAGES.index(self.stage)
        rng = np.random.default_rng([5, self.recipe.seed, index, step])
        batch = self.recipe.batches[index]
        first = (index * 10 + self.recipe.seed) * 10**8 + step * batch  # no two steps or stages share a scene
        art = augmented if stage == "vision" else ambiguous if stage in ("projector", "tuning") and step % 4 else None
        options: dict[str, Any] = {"art": art} if art else {}
        found = [scenes.draw(seed, split="train", **options) for seed in range(first, first + batch)]
        if stage == "vision":
            return Step(found, [], [], rng)
        rasters = [(raster(scene, rng, self.tokenizer), aloud(scene, self.tokenizer)) for scene in found]
        rows = [dialogue(scene, rng, self.tokenizer, *both) for scene, both in zip(found, rasters, strict=True)]
        return Step(found, rows, fact_lines(rng, self.tokenizer, batch // 2), rng)

    def ahead(self, start: int, steps: int, workers: int) -> DataLoader[Step]:
        """The steps from `start` to `steps`, prepared by so many processes."""
        return DataLoader(
            self, batch_size=None, sampler=range(start, steps), num_workers=workers, collate_fn=_as_is,
            generator=torch.Generator(),  # else it would draw from the numbers that training draws from
        )  # fmt: skip


def _as_is(step: Any) -> Any:
    return step


class Trainer:
    """The model in training and the loss of each stage at each step."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.tokenizer = make_tokenizer()
        model: Any = make_model(self.tokenizer, recipe.seed)
        self.model = model.to(device)
        torch.manual_seed(recipe.seed)
        self.head = nn.Linear(256, len(scenes.PATCH_WORDS)).to(device)  # the vision tower's teacher; dropped afterwards
        weight = torch.ones(len(scenes.PATCH_WORDS), device=device)
        weight[len(scenes.CONCEPTS) :] = 0.15
        self.class_weight = weight

    @property
    def llava(self) -> Any:
        """What lies below the unembedding: vision_tower, multi_modal_projector, language_model."""
        return self.model.model

    def trained(self, stage: str) -> nn.ModuleList:
        """The modules that a stage changes."""
        parts = {
            "vision": [self.llava.vision_tower, self.head],
            "language": [self.llava.language_model, self.model.lm_head],
            "projector": [self.llava.multi_modal_projector],
            "tuning": [self.llava.multi_modal_projector, self.llava.language_model, self.model.lm_head],
        }
        return nn.ModuleList(parts[stage])

    def steps(self, stage: str) -> Steps:
        """What the steps of a stage read."""
        return Steps(self.recipe, self.tokenizer, stage)

    def loss(self, stage: str, step: int, steps: int, read: Step) -> Tensor:
        """The loss of one step of a stage on what it reads."""
        if stage == "vision":
            return self.patch_loss(step, steps, read)
        every, alone = len(read.scenes), self.recipe.kind == "llava"
        pictured = {"language": 0, "projector": every, "tuning": every * 3 // 4 if alone else every}[stage]
        price = {"language": min(1.0, 7 * step / steps), "projector": 0.0, "tuning": 0.15}[stage]
        loss = self.text_loss(read.rows, [scene.image for scene in read.scenes[:pictured]], price if alone else 0.0)
        if stage != "projector" and alone:
            loss = loss + self.text_loss(read.facts, [])
        return loss

    def patch_loss(self, step: int, steps: int, read: Step) -> Tensor:
        """Cross-entropy of what each patch shows.

        For the first 85 % of training each picture keeps only 52 of its 100 patches, those of objects first: twice the pictures for
        the same work."""
        found, rng = read.scenes, read.rng
        target = torch.from_numpy(np.stack([scene.labels().ravel() for scene in found])).to(self.device)
        images = pixels([scene.image for scene in found]).to(self.device)
        gain = torch.from_numpy(rng.uniform(0.75, 1.25, (len(found), 3, 1, 1)).astype(np.float32)).to(self.device)
        shift = torch.from_numpy(rng.uniform(-0.2, 0.2, (len(found), 3, 1, 1)).astype(np.float32)).to(self.device)
        tower = self.llava.vision_tower
        states = tower.pre_layrnorm(tower.embeddings(images * gain + shift))
        if step < 0.85 * steps:
            is_object = (target < len(scenes.CONCEPTS)).float().cpu().numpy()
            order = np.argsort(-(is_object + rng.uniform(0, 0.99, is_object.shape)), axis=1)[:, :52]
            kept = torch.from_numpy(order).to(self.device)
            target = target.gather(1, kept)
            patches = states[:, 1:].gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
            states = torch.cat([states[:, :1], patches], dim=1)
        logits = self.head(tower.encoder(inputs_embeds=states).last_hidden_state[:, 1:])
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), self.class_weight, label_smoothing=0.05)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Projected image tokens `[images * 100, 256]`; the vision tower is frozen."""
        with torch.no_grad():
            states = self.llava.vision_tower(pixels(images).to(self.device)).last_hidden_state[:, 1:]
        return self.llava.multi_modal_projector(states).flatten(0, 1)

    def text_loss(self, rows: Sequence[Row], images: Sequence[Image.Image], price: float = 0.0) -> Tensor:
        """Weighted sum over kinds of the mean cross-entropy of what positions say, and the penalties of `Watch` where there is a `price`:
        those on words and activity times the price, that on negative neurons in full. The first rows read pictures where others read
        rasters."""
        ids, targets, kinds = pad(rows, self.device)
        embeds = self.llava.language_model.embed_tokens(ids)
        if images:
            places = (kinds == RASTER) & (torch.arange(len(rows), device=self.device) < len(images))[:, None]
            embeds = embeds.masked_scatter(places[..., None], self.features(images).to(embeds.dtype))
            if self.recipe.kind == "end-to-end":  # there the captions are the only teacher
                kinds = kinds.masked_fill(places, NOTHING)
        with Watch(self.llava.language_model) as watch:
            states = self.llava.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        kept = kinds != NOTHING
        losses = F.cross_entropy(self.model.lm_head(states[kept]).float(), targets[kept], reduction="none")
        total = losses.new_zeros(())
        for kind, weight in WEIGHTS.items():
            chosen = kinds[kept] == kind
            if chosen.any():
                total = total + weight * losses[chosen].mean()
        if price:  # at image positions words come easily: they count less
            for kind, share in ((ANSWER, 1.0), (RASTER, 0.3)):
                words, activity, negative = watch.penalties(kinds == kind, self.model.lm_head)
                total = (
                    total + price * (WORD_PENALTY * share * words + ACTIVITY_PENALTY * activity / 2) + NEGATIVE_PENALTY * negative
                )
        return total


# --------------------------------------------------------------------------------------------------------------- optimization


def optimizers(module: nn.Module, stage: str, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the vision tower's layers and of the language model's attention, AdamW for all else.

    Muon learns fastest, but its steps of equal strength in every direction spread a word over many of an FFN's neurons; the
    language model's FFNs learn at half the rate. In tuning AdamW takes everything."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "ffn": [], "other": []}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        inner = parameter.ndim == 2 and ".layers." in name and stage in ("vision", "language")
        ffn = inner and stage == "language" and ".mlp." in name
        groups["ffn" if ffn else "muon" if inner else "other"].append(parameter)
    slow = {"params": groups["ffn"], "lr": rate / 2, "share": 0.5}
    adam: Any = [{"params": groups["other"], "share": 1.0}, *([slow] if groups["ffn"] else [])]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)]
    if groups["muon"]:
        both: Any = [{"params": groups["muon"], "share": 1.0}]
        found.append(torch.optim.Muon(both, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return found


class _Float32(TorchFunctionMode):
    """Muon turns gradients to bfloat16, whatever the processor: here they stay float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].float().clone() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


def saved_state(folder: Path, stage: str, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The state that a stage left. Raises MmnError where there is none, or it is another recipe's."""
    state = folder / f"{stage}.pt"
    if not state.exists():
        raise MmnError(f"There is no {state}: run the stage {stage} first.")
    saved = torch.load(state, map_location=device, weights_only=True)
    if saved.get("recipe") != repr(recipe):
        raise MmnError(f"{state} belongs to {saved.get('recipe', 'another run')}, not to {recipe}; choose another --work folder.")
    return saved


def run_stage(trainer: Trainer, stage: str, steps: int, rate: float, folder: Path, cycles: int = 1, workers: int = 0) -> None:
    """Train one stage, resuming from `folder/<stage>.pt` if it is there, and leave its finished state there.

    With several cycles of the learning rate the stage ends with the mean of the weights at the end of each but the first."""
    module = trainer.trained(stage)
    state = folder / f"{stage}.pt"
    trainer.model.requires_grad_(False)
    chosen = optimizers(module, stage, rate)
    mean = AveragedModel(module)
    length = -(-steps // cycles)
    start = 0
    if state.exists():
        saved = saved_state(folder, stage, trainer.recipe, trainer.device)
        if saved["steps"] != steps:
            raise MmnError(f"{state} belongs to a run of {saved['steps']} steps, not {steps}; choose another --work folder.")
        module.load_state_dict(saved["module"])
        start = saved["step"]
        if start < steps:
            mean.load_state_dict(saved["mean"])
            for optimizer, values in zip(chosen, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
    warm_up = max(1, min(300, length // 10))

    def save(step: int) -> None:
        saved = {"module": module.state_dict(), "step": step, "steps": steps, "recipe": repr(trainer.recipe)}
        if step < steps:
            saved |= {"mean": mean.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in chosen]}
        with whole(state) as part:
            torch.save(saved, part)

    # A processor without AVX-512 multiplies in bfloat16 ten to forty times more slowly than in float32.
    halves = trainer.device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    saved_at = time.monotonic()
    smooth = 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, unit="step", mininterval=10)
    for step, read in zip(bar, trainer.steps(stage).ahead(start, steps, workers), strict=True):
        local = step % length
        now = rate * min(1.0, (local + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * local / length))
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = now * group["share"]
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=halves):
            loss = trainer.loss(stage, step, steps, read)
        module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        with contextlib.nullcontext() if halves else _Float32():
            for optimizer in chosen:
                optimizer.step()
        if step >= length and (local == length - 1 or step == steps - 1):
            mean.update_parameters(module)
        smooth = loss.item() if step == start else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save(step + 1)
            saved_at = time.monotonic()
    if start < steps:
        if mean.n_averaged:
            module.load_state_dict(mean.module.state_dict())
        save(steps)


def train(
    out: Path,
    work: Path,
    *,
    recipe: Recipe = Recipe(),
    scale: float = 1.0,
    only: Sequence[str] = STAGES,
    vision: Path | None = None,
    device: str | None = None,
    workers: int = 0,
) -> None:
    """Train the model and save it in `out` as an ordinary Hugging Face checkpoint, weights in fp16.

    `work` keeps the resumable state; `scale` shortens or lengthens every stage; `only` runs some of the stages (vision and language
    do not need each other and can run side by side); `vision` is a finished checkpoint whose vision tower is taken over; `workers`
    are processes that prepare steps ahead, which changes nothing in the model. Raises MmnError for a `work` folder of another run and an
    `out` of other things than a checkpoint, which a checkpoint would replace."""
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise MmnError(f"{out} holds no checkpoint that a new one could replace: give --out a folder that is new or empty.")
    if not 0 <= scale < math.inf:
        raise MmnError(f"The scale is a length relative to the full recipe, at least 0, not {scale!r}.")
    place(device, "float32")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MmnError(f"{work} cannot be made ({error.strerror}): choose another --work.") from None
    trainer = Trainer(recipe, where)
    stages = [stage for stage in STAGES if recipe.kind == "llava" or stage in ("vision", "tuning")]
    if vision is not None:
        stages.remove("vision")
        tower = LlavaForConditionalGeneration.from_pretrained(vision, dtype=torch.float32).model.vision_tower
        trainer.llava.vision_tower.load_state_dict(tower.state_dict())
    for stage in stages:
        index = STAGES.index(stage)
        steps = recipe.steps(stage, scale)
        if stage in only:
            run_stage(trainer, stage, steps, recipe.rates[index], work, recipe.cycles[index], workers)
        elif {"projector", "tuning"} & set(only):  # the first two stages stand alone
            saved = saved_state(work, stage, recipe, where)
            trainer.trained(stage).load_state_dict(saved["module"])
    if stages[-1] in only:
        export(trainer, out)


def export(trainer: Trainer, out: Path) -> None:
    """Write the checkpoint beside `out`, then put it in place; the README of the one that was there stays."""
    with whole(out) as part:
        part.mkdir()
        with in_utf8(part) as there:
            trainer.model.to(torch.float16).save_pretrained(there)
            make_processor(trainer.tokenizer).save_pretrained(there)
        if (out / "README.md").exists():
            shutil.copy2(out / "README.md", part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn train`."""
    parser.add_argument("--out", type=a_path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--work", type=a_path, required=True, help="folder of the resumable state")
    parser.add_argument("--recipe", choices=("llava", "end-to-end"), default="llava")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of every stage relative to the full recipe; 0: untrained")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="run only these stages")
    parser.add_argument("--vision", type=a_path, metavar="MODEL", help="take the vision tower of this checkpoint, don't train one")
    parser.add_argument("--device", help="cpu, cuda or mps; the default is a GPU if there is one")
    parser.add_argument("--workers", type=int, default=0, metavar="PROCESSES",
                        help="prepare steps ahead, for a GPU that would wait for pictures (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """`mmn train`."""
    recipe = Recipe(kind=args.recipe, seed=args.seed)
    train(args.out, args.work, recipe=recipe, scale=args.scale, only=args.only, vision=args.vision, device=args.device,
          workers=args.workers)  # fmt: skip
    return 0
