"""Load a vision-language model and let it caption pictures while its neurons are recorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, LogitsProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmn import anatomy, nouns
from mmn.errors import MmnError
from mmn.paths import data_path
from mmn.trace import Recorder, Trace

PROMPT = "Describe the image in few words."  # the paper's
PREFIX = "An image of"  # how the answer begins: the paper's


class VLM:
    """A vision-language model with its processor and anatomy.

    name: what it was loaded as. hash: 16 hexadecimal digits that tell its weights from others. anatomy: where its parts are."""

    def __init__(self, model: PreTrainedModel, processor: Any, name: str):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "left"
        self.anatomy = anatomy.find(model)
        self.hash = _identity(model)
        self.lexicon = nouns.lexicon(getattr(model.config, "mmn_world", None) == "scenes")
        self.image_positions: Tensor | None = None  # of the batch that is being read, bool `[batch, positions]`

    def __repr__(self) -> str:
        return f"VLM({self.name!r}, {len(self.anatomy.layers)} layers, {self.anatomy.total} neurons, {self.hash})"

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device

    def render(self, prompt: str, prefix: str, picture: bool = True) -> str:
        """The full text of a request: the chat template where the processor has one, with the answer begun by `prefix`."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] if picture else []
            talk = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
            if not prefix:
                return self.processor.apply_chat_template(talk, add_generation_prompt=True)
            talk.append({"role": "assistant", "content": [{"type": "text", "text": prefix}]})
            return self.processor.apply_chat_template(talk, continue_final_message=True)
        mark = f"{getattr(self.processor, 'image_token', '<image>')}\n" if picture else ""
        return f"{mark}{prompt} {prefix}".rstrip()

    def inputs(self, images: Sequence[Image.Image] | None, prompts: Sequence[str], prefix: str) -> BatchFeature:
        """What the model reads for these requests, left-padded, on its device."""
        texts = [self.render(prompt, prefix, images is not None) for prompt in prompts]
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
        start = self.tokenizer.bos_token
        if start and texts[0].startswith(start):
            options["add_special_tokens"] = False  # the template has written it
        if images is None:
            batch = self.tokenizer(texts, **options)
        else:
            batch = self.processor(images=list(images), text=texts, **options)
        batch = batch.to(self.device)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                batch[name] = value.to(self.model.dtype)
        self.image_positions = batch["input_ids"] == self.anatomy.image_token
        return batch

    @torch.inference_mode()
    def caption(
        self,
        images: Image.Image | Sequence[Image.Image],
        *,
        prompt: str | Sequence[str] = PROMPT,
        prefix: str = PREFIX,
        max_new_tokens: int = 50,
        batch_size: int = 8,
        record: bool = True,
    ) -> Any:
        """Describe one picture, or several, greedily; `Trace` for one, a list of them for several.

        `prompt` may differ from picture to picture. With `record` every neuron's activation at each generating position is kept.
        Raises MmnError for no pictures, prompts that do not match, or a nonsensical length."""
        single = isinstance(images, Image.Image)
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
        if not pictures:
            raise MmnError("There are no pictures to describe; give at least one.")
        if len(prompts) != len(pictures):
            raise MmnError(f"There are {len(prompts)} prompts for {len(pictures)} pictures; give one, or one for each.")
        if max_new_tokens < 1 or batch_size < 1:
            raise MmnError("max_new_tokens and batch_size must be at least 1.")
        pictures = [picture.convert("RGB") for picture in pictures]
        traces: list[Trace] = []
        for start in range(0, len(pictures), batch_size):
            part = slice(start, start + batch_size)
            traces += self._generate(pictures[part], prompts[part], prefix, max_new_tokens, record)
        return traces[0] if single else traces

    def answer(self, question: str, *, max_new_tokens: int = 30) -> str:
        """The model's answer to a question without a picture."""
        with torch.inference_mode():
            return self._generate(None, [question], "", max_new_tokens, False)[0].text.strip()

    def _generate(
        self, images: list[Image.Image] | None, prompts: list[str], prefix: str, length: int, record: bool
    ) -> list[Trace]:
        batch = self.inputs(images, prompts, prefix)
        width = batch["input_ids"].shape[1]
        said = _LogProbs()
        with Recorder(self.anatomy) if record else contextlib.nullcontext() as recorder:
            ids = self.model.generate(**batch, do_sample=False, max_new_tokens=length, logits_processor=[said])
        ids = ids[:, width:].cpu()
        logprobs = torch.stack(said.steps, 1).cpu()
        layers = [torch.stack(steps, 1) for steps in recorder.steps] if recorder else []
        stops = self.model.generation_config.eos_token_id
        ends = set(stops if isinstance(stops, list) else [stops]) | {self.tokenizer.pad_token_id}
        traces = []
        for row, tokens in enumerate(ids.tolist()):
            steps = next((s for s, token in enumerate(tokens) if token in ends), len(tokens))
            text, places = self._spell(prefix, tokens[:steps])
            traces.append(
                Trace(
                    text,
                    ids[row, :steps].clone(),
                    self.tokenizer.convert_ids_to_tokens(tokens[:steps]),
                    places,
                    logprobs[row, :steps].clone(),
                    [layer[row, :steps].float().cpu() for layer in layers],
                    images[row] if images else None,
                    prompts[row],
                    prefix,
                    self.lexicon,
                )
            )
        return traces

    def _spell(self, prefix: str, tokens: list[int]) -> tuple[str, list[int]]:
        """The text of prefix and tokens, and where in it each token ends."""
        head = self.tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
        texts = [self.tokenizer.decode(head + tokens[: n + 1], skip_special_tokens=True) for n in range(len(tokens))]
        return (texts[-1] if texts else prefix), [len(text) for text in texts]

    def replay_ids(self, trace: Trace, steps: int) -> BatchFeature:
        """The request of a trace with its first `steps` tokens appended: what the model had read when it produced token `steps`.

        Raises MmnError for a trace without a picture."""
        if trace.image is None:
            raise MmnError("This trace has no picture to read again.")
        batch = self.inputs([trace.image], [trace.prompt], trace.prefix)
        said = trace.tokens[:steps].to(self.device)[None]
        for name, extra in (("input_ids", said), ("attention_mask", torch.ones_like(said))):
            batch[name] = torch.cat([batch[name], extra], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in batch:
                batch[name] = torch.cat([batch[name], torch.zeros_like(said)], dim=1)
        self.image_positions = batch["input_ids"] == self.anatomy.image_token
        return batch


class _LogProbs(LogitsProcessor):
    """Keeps the log probability of each step's best token `[batch]`, and nothing that grows with the vocabulary."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().amax(-1) - scores.float().logsumexp(-1))
        return scores


def _identity(model: PreTrainedModel) -> str:
    """A hash of shapes and of 64 numbers at either end of every parameter: seconds for any size, and different after training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy() if parameter.device.type != "meta" else b""
        digest.update(json.dumps([name, list(parameter.shape)]).encode() + bytes(ends))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers talks while it loads; a reader's notebook keeps what it says."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def load(
    name: str | Path = "tiny-llava",
    *,
    device_map: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VLM:
    """Load the shipped model by its name, a checkpoint folder, or a model of the Hugging Face hub; safetensors only.

    Raises MmnError where there is no such model, or it is an encoder-decoder or has no vision."""
    path = data_path(str(name)) if str(name) == "tiny-llava" else name
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise MmnError(f"There is no number type {dtype!r}; use float32, bfloat16 or float16.")
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(path, **options)
        except (OSError, ValueError) as problem:
            raise MmnError(
                f"No model at {str(name)!r}: give a checkpoint folder or a Hugging Face name ({_first(problem)})."
            ) from problem
        if config.is_encoder_decoder:
            raise MmnError(
                f"{str(name)!r} is an encoder-decoder ({config.model_type}); the method needs a decoder that reads image tokens."
            )
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=getattr(torch, dtype), device_map=device_map, use_safetensors=True, **options
            )
            processor = AutoProcessor.from_pretrained(path, backend="pil", **options)
        except ValueError as problem:
            raise MmnError(
                f"{str(name)!r} ({config.model_type}) does not read pictures and write text ({_first(problem)})."
            ) from problem
        except OSError as problem:
            raise MmnError(f"The files of {str(name)!r} cannot be read ({_first(problem)}).") from problem
    return VLM(model, processor, str(name))


def _first(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0][:160].rstrip(".")
