"""`mmn throughput`: pictures a second for captioning, recording and ranking in batches, beside plain batched `generate` and beside the
loop of the paper's release (one picture at a time, no key-value cache).

Every batch is worked by the first two in turn, the order alternating, so that a machine that slows down slows both; the ratio is the
median over batches. The release's loop gets one picture of each of the first batches. `peak_mb` says how much memory the process had
used at most after each tenth of the pictures: it has to stay flat."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmn import costs, metrics, scenes, study_costs
from mmn.arguments import at_least
from mmn.bars import tqdm
from mmn.contribution import rank_all
from mmn.errors import MmnError
from mmn.pieces import about
from mmn.vlm import PREFIX, PROMPT, VLM, load

RELEASE = 8  # pictures for the slow loop


def throughput(
    vlm: VLM, pictures: int = 256, batch_size: int = 16, max_new_tokens: int = 50, compare: bool = True
) -> dict[str, Any]:
    """Pictures a second: `plain`, `ours`, `release`; `share`: ours by plain, `share_interval`: its 95 % interval over batches; `peak_mb`:
    after the first batch, which warms up, and after each tenth of the others or each of them, where they are fewer. Without `compare`
    only ours runs.

    Raises MmnError for fewer pictures than one batch."""
    if batch_size < 1 or pictures < batch_size:
        raise MmnError(f"{pictures} pictures are less than one batch of {batch_size}: give more pictures.")
    times: dict[str, list[float]] = {"plain": [], "ours": [], "release": []}
    peaks: list[float] = []
    starts = range(0, pictures - batch_size + 1, batch_size)
    for number, start in enumerate(tqdm([0, *starts], desc="throughput", leave=False, delay=5)):
        images = [scenes.draw(seed).image for seed in range(start, start + batch_size)]
        works: list[tuple[str, Callable[[], object]]] = [("ours", lambda images=images: _ours(vlm, images, max_new_tokens))]  # type: ignore[misc]
        if compare:
            works.append(("plain", lambda images=images: _plain(vlm, images, max_new_tokens, True)))  # type: ignore[misc]
            if number <= RELEASE:
                works.append(("release", lambda images=images: _plain(vlm, images[:1], max_new_tokens, False)))  # type: ignore[misc]
        for name, work in works[:: -1 if number % 2 else 1]:
            seconds, _ = costs.timed(work, vlm.device)
            if number:  # the first batch, which comes again, warms up
                times[name].append(seconds / (1 if name == "release" else batch_size))
        if number * 10 // len(starts) > len(peaks) - 1:
            peaks.append(_peak())
    speed = {name: 1 / statistics.median(each) if each else None for name, each in times.items()}
    pairs = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=False)]
    share = metrics.bootstrap(pairs, lambda some: float(np.median(some))) if pairs else None
    return {
        **speed, "share": share and share.value, "share_interval": share and share[1:], "peak_mb": peaks,
        "pictures": pictures, "batch": batch_size,
        "threads": torch.get_num_threads(), "device": str(vlm.device), "processor": costs.processor(vlm.device.type),
        "model": vlm.name, "model_hash": vlm.hash,
    }  # fmt: skip


def _ours(vlm: VLM, images: list[Image.Image], limit: int) -> None:
    rank_all(vlm, vlm.caption(images, max_new_tokens=limit, batch_size=len(images)))


def _plain(vlm: VLM, images: list[Image.Image], limit: int, cache: bool) -> object:
    inputs = vlm.inputs(images, [PROMPT] * len(images), [PREFIX] * len(images))
    return vlm.decode(inputs, vlm.generation(limit), use_cache=cache)


def _peak() -> float:
    """MB of memory that the process had at most: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows, where this command does not run

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn throughput`."""
    parser.add_argument("--model", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--random", choices=study_costs.SHAPES, help="a model of random weights of LLaVA-1.5's shape instead")
    parser.add_argument("--pictures", type=at_least(1), default=256, help="synthetic scenes (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=16, help="pictures captioned at once (default: %(default)s)")
    parser.add_argument(
        "--only-ours", action="store_true", help="leave the comparisons out, to watch the memory over many pictures"
    )
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """`mmn throughput`."""
    if args.random:
        vlm = study_costs.random_model(args.random, str(args.device_map or "cpu"), args.dtype)
    else:
        vlm = load(args.model, device_map=args.device_map, dtype=args.dtype)
    found = throughput(vlm, args.pictures, args.batch, compare=not args.only_ours)
    if args.json:
        what = "mmn throughput" + (f" --random {args.random}" if args.random else f" --model {args.model}")
        what += f" --device-map {args.device_map}" if args.device_map else ""
        what += f" --dtype {args.dtype} --pictures {args.pictures} --batch {args.batch}"
        print(json.dumps({"command": what, "dtype": args.dtype, **about(vlm), **found}, indent=1))
        return 0
    for name, what in (
        ("ours", "captions, recording, ranking"),
        ("plain", "plain generate"),
        ("release", "one at a time, no cache"),
    ):
        if found[name]:
            print(f"{what}: {found[name]:.1f} pictures a second")
    if found["share"]:
        low, high = found["share_interval"]
        times = found["ours"] / found["release"]
        print(f"ours by plain: {found['share']:.2f} [{low:.2f}, {high:.2f}]; ours by the release's loop: {times:.1f}")
    print(f"peak memory after each tenth: {', '.join(f'{mb:.0f}' for mb in found['peak_mb'])} MB")
    return 0
