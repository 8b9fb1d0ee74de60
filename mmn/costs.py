"""What a noun's neurons cost to find, at the shapes of large models: this score, its gradient, and the release's way.

`mmn bench` builds LLaVAs of random weights, from small ones up to layers of LLaVA-1.5-7B, each reading 576 image tokens, and times on each,
for one noun of a recorded caption:

- **direct**: `mmn.contributions`, all neurons of all layers; nothing is prepared.
- **whole**: activation times gradient with the whole sequence read again, which image positions need: forward and backward apart.
- **cached**: the fair baseline at the generating position: one token forward and backward on the prefix's keys and values.
- **release**: as Pan et al.'s code prepares its scores: `W_down^T W_U` for every layer, and every neuron's whole vocabulary sorted. It
  serves all nouns and pictures of a model once it is stored. Timed on some neurons of each layer, and scaled to all.

Beside them `limit`, one bare product of a direction with each layer's last map, which has to read the same weights as the direct score."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig

from mmn import plots
from mmn.contribution import contributions
from mmn.errors import MmnError
from mmn.hooks import hooked
from mmn.nouns import Noun
from mmn.paths import data_path
from mmn.trace import Trace
from mmn.vlm import VLM, place, quiet
from mmn.weights import matrix

BLOCK = 128  # neurons of each layer on which the release's way is timed
STEPS = 3  # tokens generated before the noun


class Shape(NamedTuple):
    """A decoder: width of its stream, neurons of a layer, words, layers."""

    hidden: int
    neurons: int
    vocabulary: int
    layers: int


SEVEN = Shape(4096, 11008, 32064, 32)  # LLaVA-1.5-7B
SWEEPS: dict[str, tuple[Shape, ...]] = {
    "vocabulary": tuple(Shape(1024, 2752, words, 1) for words in (4008, 8016, 16032, 32064)),
    "width": tuple(Shape(hidden, hidden * 11008 // 4096, 8016, 1) for hidden in (512, 1024, 2048, 4096)),
    "depth": tuple(Shape(1024, 2752, 8016, layers) for layers in (1, 2, 4, 8)),
    "llava-1.5-7b": (SEVEN._replace(layers=1), SEVEN._replace(layers=2)),
}
WAYS = ("direct", "cached", "whole", "release")


def build(shape: Shape, *, device: str = "cpu", dtype: str | torch.dtype = "float32", side: int = 24) -> VLM:
    """A LLaVA of random weights with such a decoder, `side * side` image tokens (LLaVA-1.5: 24), and a vision tower of no weight. Raises
    MmnError for a dtype or device that there is not."""
    kind = place(device, dtype)
    if not isinstance(kind, torch.dtype):
        raise MmnError("Random weights have no dtype of their own: give float32, bfloat16 or float16, not auto.")
    processor = AutoProcessor.from_pretrained(data_path("tiny-llava"), backend="pil")
    pixels = {"height": 14 * side, "width": 14 * side}
    processor.patch_size, processor.image_processor.size, processor.image_processor.crop_size = 14, pixels, pixels
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=14 * side, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.neurons, vocab_size=shape.vocabulary, num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 128), max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token, image_seq_length=side * side, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    with quiet(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=kind)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)  # no end: a caption has as many steps as asked for
    return VLM(model, processor, "random", hash="random")


def moment(vlm: VLM) -> tuple[Trace, Noun]:
    """A recorded caption of a grey picture, and its last token in a noun's place."""
    trace = vlm.caption(Image.new("RGB", (64, 64), "grey"), max_new_tokens=STEPS)
    return trace, Noun("", "", int(trace.tokens[-1]), STEPS - 1, (0, 0))


# ------------------------------------------------------------------------------------------------------------------- the four ways


class Graph:
    """Activation times gradient of a noun's logit: `forward` builds the graph, `backward` gives for each layer `[positions, neurons]`.

    cached: read the last position alone, on keys and values of what stands before it, which are made here, outside of any timing."""

    def __init__(self, vlm: VLM, trace: Trace, noun: Noun, *, cached: bool):
        self.vlm, self.token = vlm, noun.token
        inputs = vlm.replay(trace, noun.step)
        ids = inputs["input_ids"]
        self.given: dict[str, Any] = dict(inputs)
        self.cache: Any = None
        if cached:
            before = {key: value[:, :-1] if value.shape == ids.shape else value for key, value in inputs.items()}
            with torch.no_grad():
                self.cache = vlm.model(**before, use_cache=True, logits_to_keep=1).past_key_values
            self.given = {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids)}
        self.again()

    def again(self) -> None:
        """Make ready for another forward pass."""
        self.seen: list[Tensor] = []
        self.logit: Tensor | None = None
        if self.cache is not None:
            self.given["past_key_values"] = copy.deepcopy(self.cache)

    @torch.inference_mode(False)
    def forward(self) -> None:
        """Run the model with a graph from the first layer's activations to the noun's logit."""

        def watch(activations: Tensor) -> Tensor:
            self.seen.append(activations if self.seen else activations.detach().requires_grad_())
            return self.seen[-1]

        with torch.enable_grad(), hooked(ffn.watch(watch) for ffn in self.vlm.anatomy.ffns):
            out = self.vlm.model(**self.given, use_cache=self.cache is not None, logits_to_keep=1)
            self.logit = out.logits[0, -1, self.token].float()

    def backward(self) -> list[Tensor]:
        """The scores, for each layer `[positions, neurons]`."""
        assert self.logit is not None
        gradients = torch.autograd.grad(self.logit, self.seen)
        return [(z.detach() * g)[0] for z, g in zip(self.seen, gradients, strict=True)]


@torch.no_grad()
def release(vlm: VLM, trace: Trace, noun: Noun, neurons: int | None = None) -> list[Tensor]:
    """The direct score by way of the whole table of neurons times words, sorted, for the first `neurons` of each layer (default: all)."""
    unembedding, found = matrix(vlm.anatomy.unembedding), []
    for ffn, activations in zip(vlm.anatomy.ffns, trace.activations, strict=True):
        table = matrix(ffn.projection)[:, :neurons].T @ unembedding.T
        table.sort(descending=True)  # each neuron's words, best first
        found.append(table[:, noun.token].float().cpu() * activations[noun.step][: len(table)])
    return found


# ------------------------------------------------------------------------------------------------------------------------- measuring


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds of processor time where one thread computes alone, so that other programs do not count; else of the wall's clock."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long a run takes."""
    now = clock(device)
    synchronise(device)
    start = now()
    work()
    synchronise(device)
    return now() - start


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of the wall's clock that a run takes, and what it gives."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - start, result


def peak(work: Callable[[], Any], device: torch.device) -> float:
    """MiB of tensors that a run holds at its peak above those held before, as torch's allocator counts them: the same in equal runs.

    What Python and NumPy hold beside the tensors does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints a line when it starts and one when it stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler and seen.profiler.kineto_results
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0)) / 2**20


def measure(shape: Shape, vlm: VLM, repeats: int = 3) -> dict[str, float]:
    """Seconds and peak MiB of each way on one model.

    `limit_seconds`: a bare product with every layer's last map. `release_seconds`, `release_mib`: scaled from `BLOCK` neurons of each layer
    to all; `stored_mib`: what that way keeps on disk, in half precision."""
    trace, noun = moment(vlm)
    device = vlm.device
    row: dict[str, float] = {}

    def run(name: str, times: int, *works: Callable[[], Any], ready: Callable[[], Any] = lambda: None) -> list[float]:
        """Time some works that follow each other, the fastest run of each; the first run is also looked at for its peak."""
        spent: list[list[float]] = []
        for _ in range(times):
            ready()
            if spent:
                spent.append([seconds(work, device) for work in works])
            else:
                row[f"{name}_mib"] = peak(lambda: spent.append([seconds(work, device) for work in works]), device)
        best = [min(each) for each in zip(*spent, strict=True)]
        row[f"{name}_seconds"] = sum(best)
        return best

    maps = [matrix(ffn.projection) for ffn in vlm.anatomy.ffns]
    direction = torch.ones_like(maps[0][:, 0])
    in_turn = run("direct", 5 * repeats, lambda: contributions(vlm, trace, noun), lambda: [direction @ last for last in maps])
    row["direct_seconds"], row["limit_seconds"] = in_turn
    for name, times in (("whole", repeats), ("cached", 3 * repeats)):
        graph = Graph(vlm, trace, noun, cached=name == "cached")
        parts = run(name, times, graph.forward, graph.backward, ready=graph.again)
        row[f"{name}_forward_seconds"], row[f"{name}_backward_seconds"] = parts
        del graph
    some = min(BLOCK, shape.neurons)
    run("release", 1, lambda: release(vlm, trace, noun, some))
    for unit in ("seconds", "mib"):
        row[f"release_{unit}"] *= shape.neurons / some
    row["stored_mib"] = stored(shape)
    return row


def stored(shape: Shape) -> float:
    """MiB of the release's table, `[layers, neurons, vocabulary]` in half precision."""
    return 2 * shape.layers * shape.neurons * shape.vocabulary / 2**20


def scaled(one: dict[str, float], two: dict[str, float], layers: int) -> dict[str, float]:
    """Figures of a model of so many layers from those of one layer and of two: every layer costs what the second did.

    Memory of `direct`, `cached` and `release` is that of two layers, since they go layer by layer or hold one position."""
    return {
        name: two[name]
        if name in ("direct_mib", "cached_mib", "release_mib")
        else one[name] + (layers - 1) * (two[name] - one[name])
        for name in one
    }


def costs(sweeps: Sequence[str] = tuple(SWEEPS), device: str = "cpu", dtype: str = "float32", repeats: int = 3) -> pd.DataFrame:
    """One row a shape of the chosen sweeps: sweep, hidden, neurons, vocabulary, layers, scaled, and the figures of `measure`.

    LLaVA-1.5-7B has all its 32 layers on a GPU; elsewhere one and two, and a third row, scaled to 32. Raises MmnError for a sweep that is
    not there."""
    for name in sweeps:
        if name not in SWEEPS:
            raise MmnError(f"There are no shapes {name!r}: choose from {', '.join(SWEEPS)}.")
    rows: list[dict[str, Any]] = []
    for name in sweeps:
        shapes = (SEVEN,) if name == "llava-1.5-7b" and device.startswith("cuda") else SWEEPS[name]
        first = len(rows)
        for shape in shapes:
            vlm = build(shape, device=device, dtype=dtype)
            rows.append({"sweep": name, **shape._asdict(), "scaled": False, **measure(shape, vlm, repeats)})
            del vlm
        if name == "llava-1.5-7b" and len(shapes) == 2:
            figures = [{k: v for k, v in row.items() if k.endswith(("_seconds", "_mib"))} for row in rows[first:]]
            rows.append({"sweep": name, **SEVEN._asdict(), "scaled": True, **scaled(figures[0], figures[1], SEVEN.layers)})
    return pd.DataFrame(rows).replace([np.inf, -np.inf], np.nan)


# --------------------------------------------------------------------------------------------------------------------------- showing


def processor(device: str = "cpu") -> str:
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.machine()


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `costs` as a reader wants it: milliseconds, MiB, and how many times the direct score the others take."""
    out = table[["sweep", "hidden", "neurons", "vocabulary", "layers"]].copy()
    out["layers"] = [f"{n}, scaled" if far else str(n) for n, far in zip(table["layers"], table["scaled"], strict=True)]
    for name in ("limit", *WAYS):
        out[f"{name} ms"] = [_round(value) for value in 1000 * table[f"{name}_seconds"]]
    for name in WAYS:
        out[f"{name} MiB"] = [_round(value) for value in table[f"{name}_mib"]]
    out["stored MiB"] = [_round(value) for value in table["stored_mib"]]
    return out


def _round(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """How many times the direct score's time the others take: `backward` (the whole sequence's backward pass alone), `whole` (with its
    forward), `cached` (forward and backward of one token), `release`; and the direct score over the `limit`."""
    direct = table["direct_seconds"]
    others = {
        "backward": "whole_backward_seconds",
        "whole": "whole_seconds",
        "cached": "cached_seconds",
        "release": "release_seconds",
    }
    found = {name: table[column] / direct for name, column in others.items()}
    return pd.DataFrame({**found, "limit": direct / table["limit_seconds"]})


def summary(table: pd.DataFrame) -> str:
    """What a table of `costs` shows, in sentences whose numbers are its own."""
    found, last = ratios(table), table.iloc[-1]
    largest = found.iloc[-1]
    low = found["backward"].min()
    verdict = "at most 1/20, at every size" if low >= 20 else "more than 1/20 at some size"
    layers = f"{last['layers']:.0f} layers" + (" (scaled from 1 and 2)" if last["scaled"] else "")
    return (
        f"The direct score costs between 1/{found['backward'].max():,.0f} and 1/{low:,.0f} of the backward pass over the whole sequence: "
        f"{verdict}. One token forward and backward on the cached prefix takes {found['cached'].min():.1f} to "
        f"{found['cached'].max():.1f} times as long as the direct score. At the last shape, {last['hidden']:.0f} wide with "
        f"{layers}, a noun takes {1000 * last['direct_seconds']:,.0f} ms, {largest['limit']:.1f} times a bare product; the "
        f"backward pass alone {largest['backward']:,.0f} times as long (with its forward pass {largest['whole']:,.0f}), "
        f"one cached token {largest['cached']:.1f} times, and the release's table "
        f"{last['release_seconds'] / 3600:.2g} hours and {last['stored_mib'] / 1024:,.0f} GiB, once for all nouns."
    )


def draw(table: pd.DataFrame) -> Any:
    """A figure: time of each way over vocabulary, width and depth, both axes in powers; a bare product with the weights dashed."""
    columns = {"vocabulary": "vocabulary", "width": "hidden", "depth": "layers"}
    labels = {"vocabulary": "words", "width": "width of the stream", "depth": "layers"}
    names = {
        "release": "release's table (for all nouns)", "whole": "gradient, whole sequence", "cached": "gradient, one cached token",
        "direct": "direct score",
    }  # fmt: skip
    fig, axes = plt.subplots(1, 3, figsize=(7.2, 3.6), sharey=True, layout="constrained")
    colours = (plots.GREY, plots.BLUE, plots.GREEN, plots.VERMILION)
    for ax, (sweep, column) in zip(axes, columns.items(), strict=True):
        part = table[table["sweep"] == sweep]
        for (way, name), colour, mark in zip(names.items(), colours, "s^vo", strict=True):
            ax.plot(part[column], part[f"{way}_seconds"], color=colour, marker=mark, ms=4, label=name)
        ax.plot(part[column], part["limit_seconds"], color="black", ls="--", lw=1, label="a bare product with the weights")
        ax.set(xscale="log", yscale="log", xlabel=labels[sweep])
        ax.set_xticks(part[column], [f"{value:,}" for value in part[column]], fontsize=7)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds, one noun")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return fig


def page(folder: Path) -> str:
    """The table of the book's page "What it costs", from bench.csv and bench.json in `folder`: Markdown."""
    table = pd.read_csv(folder / "bench.csv")
    record = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    machine = record["machine"]
    out = shown(table).drop(columns="neurons").rename(columns={"vocabulary": "words"})  # so that it fits the width of the page
    lines: list[str] = []
    for what, unit in (("Time for one noun", " ms"), ("Memory", " MiB")):
        part = out[[name for name in out if name.endswith(unit) or " " not in name]].rename(
            columns=lambda name, unit=unit: name.removesuffix(unit)
        )
        lines += [f"**{what}**,{unit}:", "", "| " + " | ".join(part.columns) + " |", "|" + "---|" * len(part.columns)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in part.itertuples(index=False)] + [""]
    where = f"{machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}, {record['dtype']}"
    share = {
        name: f"{record[f'{name}_overhead']:.1%} [{low:.1%}, {high:.1%}]"
        for name in ("record", "rank")
        for low, high in [record[f"{name}_interval"]]
    }
    recording = (
        f"On {record['model']}, recording every neuron made captions slower by {share['record']}, and ranking the neurons of all nouns of "
        f"a caption took {share['rank']} of captioning (medians of {record['pairs']} pairs of runs, and their 95 % intervals)."
    )
    return "\n".join([f"Measured on: {where}.", "", summary(table), "", recording, "", *lines])
