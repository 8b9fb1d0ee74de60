"""`mmn bench`: what recording costs on top of generating, and ranking on top of that, from paired runs.

Beside these, the ways to score neurons on random models of growing size (`mmn.costs`).

Each repetition takes one picture through three timed parts, the first two in alternating order: plain `model.generate`; the same
with every neuron recorded, up to the finished Trace; and ranking all nouns of the caption, which includes finding them. Beside
these, one token is scored directly and by its gradient. Pictures are prepared before the clock starts. The figures are medians of
each repetition's own ratio, so that a machine that slows down on the way slows both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmn import atlas, costs, metrics, scenes, sources, study_costs
from mmn.arguments import a_path, at_least
from mmn.bars import tqdm
from mmn.contribution import contributions, rank
from mmn.errors import MmnError
from mmn.nouns import Noun
from mmn.paths import put
from mmn.vlm import PREFIX, PROMPT, VLM, load, place


def bench(vlm: VLM, pictures: int = 10, repeats: int = 3, max_new_tokens: int = 50) -> dict[str, Any]:
    """Three ratios: `record_overhead` (0.05: recording makes `generate` 5 % slower), `rank_overhead` (ranking all nouns of a
    caption by the time of captioning with recording) and `gradient_ratio` (scoring a token by its gradient by the time of its
    direct score; None where nothing was said); beside them the 95 % intervals of the first two over captions
    (`record_interval`, `rank_interval`), and seconds, steps and nouns (medians). Raises MmnError for numbers
    below 1."""
    if min(pictures, repeats) < 1:
        raise MmnError("pictures and repeats are whole numbers of at least 1.")
    rows, gradients = [], []
    for index in tqdm(range(pictures * repeats + 1), desc="bench", leave=False):
        image = scenes.draw(index % pictures).image
        inputs = vlm.inputs([image], [PROMPT], [PREFIX])

        def plain(inputs: dict[str, torch.Tensor] = inputs) -> Any:
            return vlm.decode(inputs, vlm.generation(max_new_tokens))

        def recorded(inputs: dict[str, torch.Tensor] = inputs, image: Image.Image = image) -> Any:
            return vlm.generate(inputs, [image], [PROMPT], [PREFIX], max_new_tokens, record=True)

        if index % 2:
            without, _ = costs.timed(plain, vlm.device)
            with_, (trace,) = costs.timed(recorded, vlm.device)
        else:
            with_, (trace,) = costs.timed(recorded, vlm.device)
            without, _ = costs.timed(plain, vlm.device)
        ranking, found = costs.timed(partial(rank, vlm, trace), vlm.device)
        ratios = []
        if len(trace.tokens):
            token = Noun("", "", int(trace.tokens[-1]), len(trace.tokens) - 1, (0, 0))
            direct, _ = costs.timed(partial(contributions, vlm, trace, token), vlm.device)
            gradient, _ = costs.timed(partial(contributions, vlm, trace, token, "gradient"), vlm.device)
            ratios.append(gradient / direct)
        if index:  # the first run warms up
            rows.append((with_ / without - 1, ranking / with_, without, with_, ranking, len(trace.tokens), len(found)))
            gradients += ratios
    names = ("record_overhead", "rank_overhead", "generate_seconds", "record_seconds", "rank_seconds", "steps", "nouns")
    figures: dict[str, Any] = {name: statistics.median(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    for column, name in enumerate(("record", "rank")):
        _, *figures[f"{name}_interval"] = metrics.bootstrap([row[column] for row in rows], lambda some: float(np.median(some)))
    figures["gradient_ratio"] = statistics.median(gradients) if gradients else None
    return figures | {
        "pairs": len(rows), "threads": torch.get_num_threads(), "device": str(vlm.device), "model": vlm.name, "model_hash": vlm.hash
    }  # fmt: skip


def atlas_memory(shape: costs.Shape, pictures: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """GiB of tensors that the atlas of a random model of this shape holds at its peak, above what the loaded model takes."""
    vlm = costs.build(shape, device=device, dtype=dtype)
    shown = sources.load("scenes", pictures, 0)
    return costs.peak(lambda: atlas.compute(vlm, shown), torch.device(device)) / 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn bench`."""
    parser.add_argument("--model", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--pictures", type=at_least(1), default=10, help="synthetic scenes to caption (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="times each thing is done (default: %(default)s)")
    parser.add_argument("--shapes", nargs="*", default=list(costs.SWEEPS), choices=costs.SWEEPS, metavar="NAME",
                        help=f"random models to compare ways on; no name: none (default: {' '.join(costs.SWEEPS)})")  # fmt: skip
    parser.add_argument("--atlas", type=int, metavar="LAYERS",
                        help="only the atlas' peak memory, on random layers of LLaVA-1.5-7B's shape, so many")  # fmt: skip
    parser.add_argument("--study", action="store_true",
                        help="only what `mmn replicate` costs, on random layers of LLaVA-1.5's shapes")  # fmt: skip
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")
    parser.add_argument("--out", type=a_path, metavar="FOLDER", help="keep the table there, as bench.csv or study.csv, with a JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """`mmn bench`."""
    device = "cuda" if str(args.device_map).startswith(("cuda", "auto")) and torch.cuda.is_available() else "cpu"
    where = f" --device-map {args.device_map}" if args.device_map else ""
    kind = place(args.device_map, args.dtype)
    if not isinstance(kind, torch.dtype):
        raise MmnError("Random weights have no dtype of their own: give float32, bfloat16 or float16, not auto.")
    if args.atlas is not None:
        if args.atlas < 1:
            raise MmnError("--atlas is a number of layers of at least 1.")
        memory = atlas_memory(costs.SEVEN._replace(layers=args.atlas), args.pictures, device, kind)
        print(f"{args.atlas} layers, {args.pictures} pictures: the atlas takes {memory:.2f} GiB above the loaded model")
        return 0
    machine = {"processor": costs.processor(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.study:
        table = study_costs.study(device, args.dtype)
        if args.out:
            said = {"command": f"mmn bench --study{where} --dtype {args.dtype}", "machine": machine, "dtype": args.dtype}
            put(args.out / "study.json", json.dumps(said, indent=1) + "\n")
            put(args.out / "study.csv", table.to_csv(index=False, float_format="%.5g"))
        print(study_costs.shown(table).round(2).to_string())
        return 0
    figures = bench(load(args.model, device_map=args.device_map, dtype=args.dtype), args.pictures, args.repeats)
    table = costs.costs(args.shapes, device, args.dtype, args.repeats)
    figures |= {"machine": machine, "dtype": args.dtype, "repeats": args.repeats}
    if args.out:
        command = f"mmn bench --model {args.model}{where} --dtype {args.dtype}"
        record = json.dumps({"command": command, **figures}, indent=1)
        put(args.out / "bench.json", record + "\n")
        put(args.out / "bench.csv", table.to_csv(index=False, float_format="%.5g"))
    if args.json:
        print(json.dumps(figures | {"shapes": json.loads(table.to_json(orient="records"))}, indent=1))
        return 0
    print(f"recording: {figures['record_overhead']:+.1%} on {figures['generate_seconds'] * 1000:.0f} ms of generating")
    print(f"ranking {figures['nouns']:g} nouns: {figures['rank_overhead']:+.1%} of captioning with recording")
    if figures["gradient_ratio"]:
        print(f"one token by its gradient: {figures['gradient_ratio']:.0f} times as long as by its direct score")
    if len(table):
        print(costs.shown(table).to_string(index=False))
        print(costs.summary(table))
    return 0
