"""Load a vision-language model and let it caption pictures, with every neuron's activation recorded where a token is produced."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import ModelOutput, cached_file
from transformers.utils import logging as hf_logging

from mmn import nouns, weights
from mmn.anatomy import Anatomy, find
from mmn.bars import tqdm
from mmn.errors import MmnError, whole_number
from mmn.images import to_rgb
from mmn.paths import data_path
from mmn.scenes import PROMPT as PROMPT
from mmn.trace import WINDOW, Recorder, Trace

PREFIX = "An image of"
WHOLE, BLOCK = 1 << 28, 1 << 14  # bytes of a weight file that are hashed: all up to so many, else so many in each MiB
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate makes; any other text is one device


class VLM:
    """A vision-language model ready for work: .model, .processor, .tokenizer, .anatomy, .name and .hash (of the weights as
    loaded).

    Build one yourself from any transformers model and its processor where `mmn.load` does not do; `lexicon` finds the nouns of a
    caption (mmn.nouns), `prompt` is what a picture's caption is asked with wherever nothing else is said. A VLM is for one thread at a
    time: recording, interventions and edits are hooks on the model's own modules, which every thread's passes go through."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "",
        *,
        anatomy: Anatomy | None = None,
        lexicon: nouns.Lexicon | None = None,
        prompt: str = PROMPT,
        hash: str | None = None,
    ):
        if not isinstance(prompt, str):
            raise MmnError(f"prompt is text, not {prompt!r}.")
        _check_kind(model.config, name or type(model).__name__)
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None:
            raise MmnError(f"The processor {type(processor).__name__} has no tokenizer, so this model reads and writes no text.")
        self.tokenizer.padding_side = "left"  # so that the last position of every row produces its next token
        if getattr(self.tokenizer, "pad_token", "") is None:  # any will do: the attention mask hides it
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.anatomy = anatomy or find(model)
        self.name = name or type(model).__name__
        self.lexicon = lexicon or nouns.lexicon(nouns.drawn_world(model.config))
        self.prompt = prompt
        self.hash = hash or hash_tensors(model.state_dict())
        if getattr(processor, "chat_template", None) is None and getattr(self.tokenizer, "chat_template", None):
            self._take_template()

    def __repr__(self) -> str:
        return f"VLM({self.name!r}, {len(self.anatomy.ffns)} layers, {self.anatomy.total:,} neurons, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return weights.device(self.model.get_input_embeddings())

    @property
    def hidden(self) -> int:
        """Width of the decoder's stream."""
        return self.anatomy.unembedding.in_features

    # ------------------------------------------------------------------------------------------------------------- inputs

    def inputs(self, images: Sequence[Image.Image | None], prompts: Sequence[str], prefixes: Sequence[str]) -> dict[str, Tensor]:
        """What the model's forward takes for a batch of pictures (all or none may be None), left-padded, on the model's
        device."""
        with_image = images[0] is not None
        if any((image is not None) != with_image for image in images):
            raise MmnError("Either every item of a batch has a picture or none has: caption the others in a call of their own.")
        around = self._around
        texts = [self.chat(prompt, prefix, with_image) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        try:
            encoded = self._processed(texts, [_enlarged(image) for image in images if image is not None], around.nested)
        except _REFUSED as error:
            raise MmnError(f"The model's processor refuses this picture or prompt: {_line(error)}") from error
        if around.tokens:  # what the processor sets behind a prompt, and the answer has begun already
            length = encoded["input_ids"].shape[1]
            encoded = {k: v[:, : -around.tokens] if v.shape[:2] == (len(texts), length) else v for k, v in encoded.items()}
            if "token_type_ids" in encoded:
                self._set_types(encoded["input_ids"], encoded["token_type_ids"], prefixes)
        moved = {}
        for key, value in encoded.items():
            floating = value.is_floating_point()
            moved[key] = value.to(self.device, self.model.get_input_embeddings().weight.dtype if floating else value.dtype)
        self._check_length(moved["input_ids"].shape[1])
        return moved

    def _processed(self, texts: list[str], images: list[Image.Image], nested: bool = True) -> dict[str, Tensor]:
        """What the processor makes of some texts, each with its picture, or all without."""
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if bos and texts[0].startswith(bos):
            options["add_special_tokens"] = False  # the template has set them
        if images:
            options["images"] = [[image] for image in images] if nested else images
        with quiet():
            given = self.processor(**options)
        return {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "labels"}  # they train

    def _set_types(self, ids: Tensor, types: Tensor, prefixes: Sequence[str]) -> None:
        """Give the beginnings of answers the type of what the model writes itself."""
        own = self._type_of_words(types)
        for row, prefix in enumerate(prefixes):
            tokens = ids[row].tolist()
            count = next((n for n in range(len(tokens)) if prefix.strip() in self.tokenizer.decode(tokens[len(tokens) - n :])), 0)
            types[row, len(tokens) - count :] = own

    def _type_of_words(self, types: Tensor) -> int:
        """The token type of a word that the model writes behind a prompt of such types."""
        continued = self.model._update_model_kwargs_for_generation(ModelOutput(), {"token_type_ids": types})
        return int(continued["token_type_ids"][0, -1])

    def chat(self, prompt: str, prefix: str, image: bool = True) -> str:
        """The text of one conversation: the picture, the prompt, and the beginning of the answer."""
        if getattr(self.processor, "chat_template", None) is not None:
            return self._conversation(prompt, prefix, image)
        mark, between = self._around.mark if image else "", self._around.text or " "
        return f"{mark}{prompt}{between}{prefix}".rstrip(" ")

    def _conversation(self, prompt: str, prefix: str, image: bool, ended: bool = False) -> str:
        """The same by the processor's chat template; ended: with a whole answer in place of one to be continued."""
        asked: list[dict[str, Any]] = [*([{"type": "image"}] if image else []), {"type": "text", "text": prompt}]
        mark = getattr(self.processor, "image_token", "") if image else ""
        # Contents in parts, as most templates take them; some, of models that came before those, take a text.
        forms: list[tuple[Any, Any]] = [(asked, [{"type": "text", "text": prefix}]), (f"{mark}\n{prompt}".lstrip("\n"), prefix)]
        for question, answer in forms:
            conversation = [{"role": "user", "content": question}]
            conversation += [{"role": "assistant", "content": answer}] if prefix else []
            more = {} if ended else {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
            try:
                text: str = self.processor.apply_chat_template(conversation, **more)
            except Exception as error:  # a template is a program of its own
                reason = _line(error)
                continue
            if prompt in text and str(question) not in text or question is forms[1][0]:
                return text
            reason = "it leaves out the prompt"
        raise MmnError(f"The model's chat template refuses this conversation: {reason}")

    def _take_template(self) -> None:
        """Use the tokenizer's chat template, where the processor has none, if it leaves the picture's mark in its place."""
        mark = getattr(self.processor, "image_token", None)
        self.processor.chat_template = self.tokenizer.chat_template
        try:
            fits = bool(mark) and str(mark) in self._conversation(PROMPT, PREFIX, True)
        except MmnError:
            fits = False
        if not fits:
            self.processor.chat_template = None

    @cached_property
    def _around(self) -> _Around:
        """What this processor wants around a prompt with a picture, and what it sets behind it, found by trying."""
        templated = getattr(self.processor, "chat_template", None) is not None
        mark = "" if templated else str(getattr(self.processor, "image_token", None) or "")
        marks = list(dict.fromkeys(("", mark)))
        token = self.anatomy.image_token
        token = getattr(self.processor, "image_token_id", None) if token is None else token  # of models that see by cross-attention
        picture = Image.new("RGB", (64, 64))
        for nested, mark in itertools.product((True, False), marks):
            text = self._conversation(PROMPT, PREFIX, True) if templated else f"{mark}{PROMPT} {PREFIX}"
            try:
                encoded = self._processed([text], [picture], nested)
            except _REFUSED:
                continue
            ids = encoded["input_ids"][0].tolist()
            seen = [token in ids, *(encoded[name].any() for name in ("image_embeds_position_mask",) if name in encoded)]
            words = [id for id in ids if id != token]  # a mark may be no token at all, but a number below 0
            behind = next((n for n in range(5) if self.tokenizer.decode(words[: len(words) - n]).endswith(PREFIX)), 0)
            if (token is None or any(seen)) and token not in ids[len(ids) - behind :]:
                return _Around(mark, nested, self.tokenizer.decode(ids[len(ids) - behind :], skip_special_tokens=True), behind)
        return _Around(marks[-1], True, "", 0)

    def image_positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which positions of a prompt hold the picture, bool `[batch, positions]`."""
        marked = inputs.get("image_embeds_position_mask")  # of models whose tokens do not say it
        return self.anatomy.image_positions(inputs["input_ids"]) if marked is None else marked.bool()

    def _check_length(self, length: int) -> None:
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or length
        if length > limit:
            raise MmnError(f"The prompt has {length} tokens and this model reads at most {limit}: shorten it.")

    # ----------------------------------------------------------------------------------------------------------- captions

    @overload
    def caption(
        self, image: Image.Image | None, prompt: str = ..., prefix: str = ..., max_new_tokens: int = ..., *,
        batch_size: int = ..., record: bool = ...,
    ) -> Trace: ...  # fmt: skip

    @overload
    def caption(
        self, image: Sequence[Image.Image | None], prompt: str | Sequence[str] = ..., prefix: str | Sequence[str] = ...,
        max_new_tokens: int = ..., *, batch_size: int = ..., record: bool = ...,
    ) -> list[Trace]: ...  # fmt: skip

    def caption(
        self,
        image: Image.Image | None | Sequence[Image.Image | None],
        prompt: str | Sequence[str] | None = None,
        prefix: str | Sequence[str] = PREFIX,
        max_new_tokens: int = 50,
        *,
        batch_size: int = 8,
        record: bool = True,
    ) -> Trace | list[Trace]:
        """Caption one picture (a Trace) or several (a list of Traces, worked in batches), greedily, the answer begun with
        `prefix`.

        None for a picture asks in words alone. `prompt` (None: `vlm.prompt`) and `prefix` may be lists with one for each picture.
        `record=False` leaves the activations out. Raises MmnError for anything but pictures, and for limits below 1."""
        alone = image is None or isinstance(image, Image.Image)
        images: list[Any] = list(image) if isinstance(image, Iterable) and not alone else [image]
        if not images:
            raise MmnError("There are no pictures to caption: give at least one.")
        for each in images:
            if each is not None and not isinstance(each, Image.Image):
                raise MmnError(f"A picture is a PIL image, not {type(each).__name__}: open a file with mmn.open_image.")
        for what, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            whole_number(what, value)
        images = [each if each is None else _opened(each) for each in images]
        prompts, prefixes = (
            _each("prompt", self.prompt if prompt is None else prompt, len(images)),
            _each("prefix", prefix, len(images)),
        )
        traces: list[Trace] = []
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, desc="captions", leave=False, delay=5):
            rows = slice(start, start + batch_size)
            asked = images[rows], prompts[rows], prefixes[rows]
            traces += self.generate(self.inputs(*asked), *asked, max_new_tokens, record)
        return traces[0] if alone else traces

    def answer(self, text: str, image: Image.Image | None = None, max_new_tokens: int = 20) -> str:
        """The model's answer to a question, with or without a picture."""
        return self.caption(image, text, "", max_new_tokens, record=False).text.strip()

    def generation(self, max_new_tokens: int) -> GenerationConfig:
        """Plain greedy decoding, whatever the checkpoint's own settings are, with its own special tokens."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
            temperature=1.0, top_k=50, top_p=1.0, min_new_tokens=0, return_dict_in_generate=False,
            eos_token_id=sorted(self.end_tokens) or None,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        inputs: dict[str, Tensor],
        images: Sequence[Image.Image | None],
        prompts: Sequence[str],
        prefixes: Sequence[str],
        limit: int,
        record: bool,
    ) -> list[Trace]:
        """`caption` of one batch from inputs that are ready."""
        config = self.generation(limit)
        beams = (config.num_beams or 1) > 1
        if record and beams:
            raise MmnError("Beam search reads several answers a picture side by side and cannot be recorded: say record=False.")
        probabilities = _LogProbabilities()
        recorder = Recorder(self.anatomy)
        with recorder.on() if record else nullcontext(), quiet():
            try:
                out = self.model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([probabilities]))
            except MmnError:
                raise
            except (TypeError, ValueError) as error:
                if images[0] is None:
                    if "pixel_values" not in str(error):
                        raise
                    raise MmnError("This model answers only with a picture: give one.") from None
                raise MmnError(
                    f"The model does not read pictures as its processor gives them ({_line(error)}): take another."
                ) from error
        length = inputs["input_ids"].shape[1]
        tokens = out[:, length:].cpu()
        logprobs = torch.full(tokens.shape, torch.nan) if beams else torch.stack(probabilities.kept, 1).cpu()
        stream = torch.stack(recorder.stream, 1).float() if record else None
        ends = self.end_tokens
        traces = []
        for row in range(len(images)):
            stops = [step for step, token in enumerate(tokens[row].tolist()) if token in ends]
            steps = stops[0] if stops else tokens.shape[1]
            said = tokens[row, :steps]
            context = inputs["input_ids"][row, -WINDOW:].tolist()
            trace = Trace(
                said, bool(stops), logprobs[row, :steps],
                [step[row] for step in recorder.steps[:steps]] if record else None, self.anatomy.neurons,
                stream[row, :steps] if stream is not None else None,
                images[row], prompts[row], prefixes[row], self.tokenizer, context, self.lexicon,
            )  # fmt: skip
            traces.append(trace)
        return traces

    @property
    def end_tokens(self) -> set[int]:
        """The tokens that end an answer: the checkpoint's own, else its tokenizer's, and what the chat template sets behind one."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return {*(ends if isinstance(ends, list) else [ends] if ends is not None else []), *self._end_of_turn}

    @property
    def end_token(self) -> int:
        """The token that ends an answer as the model was taught to end one. Raises MmnError if there is none."""
        ends = self.end_tokens
        if not ends:
            raise MmnError("This model has no token that ends an answer: set model.generation_config.eos_token_id.")
        return next(iter(self._end_of_turn), self.tokenizer.eos_token_id if self.tokenizer.eos_token_id in ends else min(ends))

    @cached_property
    def _end_of_turn(self) -> list[int]:
        """The special token that the chat template sets behind an answer, if it sets one."""
        if getattr(self.processor, "chat_template", None) is None:
            return []
        behind = self._conversation(PROMPT, PREFIX, False, ended=True).rpartition(PREFIX)[2]
        ids = [id for id in self.tokenizer(behind, add_special_tokens=False).input_ids if self.tokenizer.decode([id]).strip()]
        return ids[:1] if ids and ids[0] in self.tokenizer.added_tokens_decoder else []

    # ------------------------------------------------------------------------------------------------------------- replay

    def replay(self, trace: Trace, steps: int) -> dict[str, Tensor]:
        """The inputs of one forward pass over a trace's prompt and its first `steps` tokens: its last position is the one that
        produced token `steps`, the position `steps - s` before it the one that produced token s."""
        inputs = self.inputs([trace.image], [trace.prompt], [trace.prefix])
        ids = inputs["input_ids"]
        new = trace.tokens[None, :steps].to(ids.device)
        for key, value in inputs.items():
            if value.shape == ids.shape:  # masks and types of tokens: text, attended to
                fill = 1 if "attention" in key else self._type_of_words(value) if key == "token_type_ids" else 0
                more = new if key == "input_ids" else value.new_full(new.shape, fill)
                inputs[key] = torch.cat([value, more.to(value.dtype)], 1)
            elif value.shape[:2] == ids.shape and "mask" in key:  # which pictures each word sees: as many as the one before
                inputs[key] = torch.cat([value, value[:, -1:].repeat_interleave(steps, 1)], 1)
        return inputs


class _Around(NamedTuple):
    """What goes around a prompt: the mark of a picture before it where there is no chat template; whether each text's pictures
    are a list of their own; and what the processor sets behind every text by itself, as text without special tokens and as a
    number of tokens."""

    mark: str
    nested: bool
    text: str
    tokens: int


class _LogProbabilities(LogitsProcessor):
    """Keeps the log probability of the likeliest token, which greedy decoding takes, `[batch]` a step."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = scores.float()
        self.kept.append(values.amax(-1) - values.logsumexp(-1))
        return scores


_REFUSED = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)  # what processors raise


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _each(what: str, value: str | Sequence[str], count: int) -> list[str]:
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise MmnError(f"There are {count} pictures and {len(values)} of {what}: give one, or one for each picture.")
    if not all(isinstance(each, str) for each in values):
        raise MmnError(f"{what} is text, not {next(each for each in values if not isinstance(each, str))!r}.")
    return values


def _opened(image: Image.Image) -> Image.Image:
    """A picture as mmn.open_image gives it: what the model sees is then what the trace keeps. Raises MmnError where it is damaged."""
    if not min(image.size):
        raise MmnError(f"A picture of {image.width} x {image.height} pixels shows nothing: give another one.")
    try:
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return image if image.mode == "RGB" and not turned and not image.has_transparency_data else to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # of Pillow's decoders, which read as late as now
        raise MmnError(f"A picture is damaged or cut short ({_line(error)}): get it again.") from None


def _enlarged(image: Image.Image) -> Image.Image:
    """RGB; a picture a few pixels wide grows, because processors take a side of 1 or 3 for the colours."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    factor = -(-8 // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


# ------------------------------------------------------------------------------------------------------------------- loading


def load(
    name: str | PathLike[str] = "tiny-llava",
    *,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lexicon: nouns.Lexicon | None = None,
    prompt: str = PROMPT,
    **options: Any,
) -> VLM:
    """A vision-language model: the shipped `tiny-llava`, a checkpoint folder, or a Hugging Face name.

    device_map: None for the CPU, `cuda`, `mps`, or `auto` to spread a large model (needs accelerate). dtype: `float32` (the
    default, whatever the checkpoint holds), `bfloat16`, `float16` or `auto`. revision: branch, tag or commit on the Hub. lexicon, prompt:
    as in `VLM`.
    Further options, such as `quantization_config`, go to `from_pretrained`. Only safetensors are read, and a download's own
    code runs only with `trust_remote_code=True`. Raises MmnError where there is no such model, it reads no pictures, or weights
    are missing."""
    where = resolve(name)
    kind = place(device_map, dtype)  # before anything slow
    simple = isinstance(device_map, str) and device_map not in SPREAD
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where, **common)
            builder = _builder(config)
            if builder is None:
                raise MmnError(f"{name} is a {config.model_type}, which does not write text about pictures: choose another model.")
            _check_kind(config, str(name))
            files = _weight_files(where, revision)
            try:
                processor = AutoProcessor.from_pretrained(where, backend="pil", **common)
            except (OSError, ValueError) as error:
                if not _line(error).startswith(("Can't load", "Unrecognized")):
                    raise
                processor = None  # there is none
            if not callable(getattr(processor, "tokenizer", None)):
                raise MmnError(
                    f"{name} has no processor of pictures and words together: write one as the page Bring your own model of the book "
                    "shows, and hand it with the model to mmn.VLM."
                )
            model, report = builder.from_pretrained(
                where, dtype=kind, device_map=None if simple else device_map, use_safetensors=True, output_loading_info=True,
                **common, **options,
            )  # fmt: skip
        except MmnError:
            raise
        except ImportError as error:
            package = re.search(r"requires the (\S+) library", str(error))
            needs = f"it needs {package.group(1).lower()}, which is not installed" if package else _line(error)
            raise MmnError(f"{name} could not be loaded: {needs}") from error
        except Exception as error:  # whatever transformers, safetensors and the Hub's client raise on files that are not whole
            if "couldn't connect" in _line(error):
                advice = "go online, or give the folder of a saved model"
                raise MmnError(f"{name} is not on this machine, and the Hub cannot be reached: {advice}.") from error
            raise MmnError(f"{name} could not be loaded: {_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise MmnError(f"The checkpoint {name} lacks {len(missing)} weights, such as {missing[0]}: it is not whole.")
    if simple:
        try:
            model = model.to(device_map)
        except torch.OutOfMemoryError as error:
            raise MmnError(f"{name} does not fit {device_map}: {_line(error)}") from error
    return VLM(model, processor, str(name), lexicon=lexicon, prompt=prompt, hash=hash_files(files))


def _check_kind(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise MmnError(f"{name} is an encoder-decoder ({config.model_type}): choose a model with a decoder alone.")


def place(device_map: str | dict[str, Any] | None, dtype: str | torch.dtype) -> torch.dtype | str:
    """The dtype by its name. Raises MmnError where there is none of that name, and for a device that this machine does not have."""
    kind = dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, str(dtype), None)
    if kind not in ("auto", torch.float32, torch.bfloat16, torch.float16):
        raise MmnError(f"There is no dtype {dtype!r}: use float32, bfloat16, float16 or auto.")
    if isinstance(device_map, str) and device_map not in SPREAD:
        try:
            if torch.empty(1, device=device_map).is_meta:
                raise RuntimeError("it holds no numbers")
        except (RuntimeError, AssertionError) as error:
            raise MmnError(
                f"The device {device_map!r} cannot be used ({_line(error)}): choose cpu, or one that is here."
            ) from error
    return kind


def _builder(config: Any) -> Any:
    """What builds a model of this configuration that writes text about pictures, transformers itself or the checkpoint's own code;
    None where nothing does."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    own = getattr(config, "auto_map", None) or {}
    builders = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel)  # checkpoints name theirs by one of these
    return next((builder for builder in builders if builder.__name__ in own), None)


def resolve(name: str | PathLike[str]) -> str:
    """A folder, or the name for the Hub. A shipped model's name stands for its folder."""
    text = str(name)
    if os.path.isdir(text):  # which, unlike Path, takes a name that is too long for one that is not there
        if not (Path(text) / "config.json").exists():
            raise MmnError(f"The folder {text} holds no checkpoint (no config.json): give the folder of a saved model.")
        return text
    if os.path.exists(text):
        raise MmnError(f"{text} is a file: give the folder of a saved model, or a Hugging Face name.")
    try:
        return str(data_path(text))
    except (MmnError, OSError):
        if "/" not in text or text.startswith((".", "/", "~")):
            choices = "tiny-llava, an existing folder, or a Hugging Face name as owner/model"
            raise MmnError(f"There is no model {text!r}: give {choices}.") from None
        return text


def _weight_files(where: str, revision: str | None) -> list[Path]:
    """The weight files of a checkpoint, which this downloads if need be."""
    index = cached_file(where, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(where, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise MmnError(f"{where} has no weights in safetensors, the only format that is read here: convert them first.")
        return [Path(single)]
    from transformers.utils.hub import get_checkpoint_shard_files

    shards, _ = get_checkpoint_shard_files(where, index, revision=revision)
    return [Path(shard) for shard in shards]


def hash_files(files: Sequence[Path]) -> str:
    """16 hex digits for a checkpoint's weight files: of every byte of a file up to WHOLE bytes, else of its size and a BLOCK in every
    MiB, which no change of a neuron's write, a number in each row of a matrix, escapes."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as handle:
            # One BLOCK further on in each MiB: rows of a power of two bytes would else put a column between the blocks of all of them.
            for start in range(0, size, 1 << 20 if size <= WHOLE else (1 << 20) + BLOCK):
                handle.seek(start)
                digest.update(handle.read(1 << 20 if size <= WHOLE else BLOCK))
    return digest.hexdigest()[:16]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits for the names, shapes and values of some weights."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        if value.device.type != "meta":
            digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars out of notebooks."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
