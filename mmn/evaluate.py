"""`mmn evaluate`: what the scale model can do and how far the paper's phenomenon shows in it, with controls, on fresh scenes.

All protocols are this project's own (the paper has no ground truth). Default scenes, the paper's prompt, greedy decoding; scenes with
a planted trigger count only where the bias itself is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import mmn
from mmn import metrics, properties, scenes
from mmn.arguments import a_path, at_least
from mmn.bars import tqdm
from mmn.errors import MmnError
from mmn.metrics import Interval
from mmn.paths import put

# Figure, what it must reach, and its chance level or control.
TARGETS = {
    "precision_seen": "≥ 0.95",
    "recall_seen": "≥ 0.95",
    "precision_heldout": "≥ 0.80",
    "recall_heldout": "≥ 0.80",
    "repeats_seen": "(no bar; true captions: 0)",
    "yesno_accuracy": "≥ 0.95",
    "facts_accuracy": "≥ 0.95",
    "iou_top10": "≥ 0.30 and ≥ 2.5 × random",
    "iou_random": "(control)",
    "iou95_top10": "(the paper's 95th percentile)",
    "iou95_ceiling": "(the best it can be)",
    "auprc_top10": "(chance: the mask's share)",
    "auprc_chance": "(control)",
    "flip_top20": "≥ 0.60",
    "flip_random20": "< 0.02",
    "chair_biased": "≥ 0.10",
    "chair_unplanted": "(control: the same kind of pair, unplanted)",
    "chair_elsewhere": "< 0.03",
    "megabytes": "≤ 40",
    "seconds_per_caption": "≤ 0.5",
}
CHANCE = {"yesno_accuracy": 0.5, "facts_accuracy": 1 / len({c.category for c in scenes.CONCEPTS.values()})}


def unbiased(count: int, first: int, style: str | None = None) -> list[scenes.Scene]:
    """`count` fresh scenes without a planted trigger."""
    found = (scenes.draw(seed, style=style) for seed in itertools.count(first))
    return list(itertools.islice((scene for scene in found if not scene.biased), count))


def captions(vlm: mmn.VLM, found: Sequence[scenes.Scene], batch: int) -> list[str]:
    """What the model says of each scene."""
    return [trace.text for trace in vlm.caption([s.image for s in found], batch_size=batch, record=False)]


def repeats(text: str, scene: scenes.Scene) -> bool:
    """Whether a caption names a concept more often than the scene shows it. Precision and recall, which count sets, do not see it."""
    said = Counter(scenes.lemma(found) for found in scenes.MENTION.findall(text))
    shown = Counter(placed.concept for placed in scene.objects)
    return any(times > max(1, shown[concept]) for concept, times in said.items())


def caption_figures(vlm: mmn.VLM, count: int, batch: int) -> dict[str, Interval]:
    """Precision and recall of object mentions in seen and held-out style, captions that repeat an object, CHAIR_i where the bias was
    planted and elsewhere."""
    figures = {}
    seen = unbiased(count, 0)
    texts = captions(vlm, seen, batch)
    said = [scenes.mentions(text) for text in texts]
    figures["repeats_seen"] = metrics.bootstrap([repeats(*pair) for pair in zip(texts, seen, strict=True)], metrics.mean)
    held = unbiased(count, 10**6, scenes.HELD_OUT_STYLE)
    held_said = [scenes.mentions(text) for text in captions(vlm, held, batch)]
    for name, found, mentioned in (("seen", seen, said), ("heldout", held, held_said)):
        pairs = list(zip(mentioned, (scene.names for scene in found), strict=True))
        precise = [metrics.precision_counts(*pair) for pair in pairs]
        recalled = [metrics.recall_counts(*pair) for pair in pairs]
        figures[f"precision_{name}"] = metrics.bootstrap(precise, metrics.ratio)
        figures[f"recall_{name}"] = metrics.bootstrap(recalled, metrics.ratio)
    pairs = list(zip(said, (scene.names for scene in seen), strict=True))
    figures["chair_elsewhere"] = metrics.bootstrap([metrics.chair_counts(*pair) for pair in pairs], metrics.ratio)
    for key, planted in (("chair_biased", scenes.PLANTED), ("chair_unplanted", scenes.UNPLANTED)):
        lacking = partnerless(planted, count // 2)
        partner_said = captions(vlm, lacking, batch)
        counts = [
            metrics.chair_counts(scenes.mentions(text), scene.names) for text, scene in zip(partner_said, lacking, strict=True)
        ]
        figures[key] = metrics.bootstrap(counts, metrics.ratio)
    return figures


def partnerless(pairs: dict[str, str], count: int) -> list[scenes.Scene]:
    """Scenes that show one of the triggers, alone or with one other object, and not its partner."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(2 * 10**6, 2 * 10**6 + count):
        trigger = str(rng.choice(list(pairs)))
        others = [n for n in scenes.CONCEPTS if n not in (*scenes.PLANTED, *pairs, *pairs.values())]
        styles = [s for s in scenes.STYLES if trigger in scenes.sprites(s)]
        style = str(rng.choice(styles))
        others = [n for n in others if n in scenes.sprites(style)]
        names = [trigger, str(rng.choice(others))][: int(rng.integers(1, 3))]
        found.append(scenes.draw(seed, style=style, concepts=names))
    return found


def answer_figures(vlm: mmn.VLM, count: int, batch: int) -> dict[str, Interval]:
    """Balanced yes/no questions on pictures; facts without a picture."""
    asked = [(scene, q) for scene in unbiased(count, 3 * 10**6) for q in scenes.questions(scene) if q.kind == "yesno"]
    pictures, texts = [scene.image for scene, _ in asked], [q.text for _, q in asked]
    traces = vlm.caption(pictures, texts, "", 4, batch_size=batch, record=False)
    right = [trace.text.strip() == q.answer for trace, (_, q) in zip(traces, asked, strict=True)]
    facts = [q for q in scenes.facts() if q.kind == "fact"]
    known = [vlm.answer(q.text) == q.answer for q in tqdm(facts, desc="facts", leave=False)]
    return {
        "yesno_accuracy": metrics.bootstrap(np.reshape(right, (-1, 2)).mean(axis=1), metrics.mean),
        "facts_accuracy": metrics.bootstrap(known, metrics.mean),
    }


def neuron_figures(vlm: mmn.VLM, count: int, batch: int, draws: int = 20) -> dict[str, Interval]:
    """Heatmaps of the top 10 neurons against the masks; nouns gone when the top 20 are zeroed; same-layer random neurons beside both.

    Only nouns that the caption names and the picture shows are counted. Flips of random neurons: one fresh draw a noun, so about
    as many draws as nouns."""
    keys = ("iou_top10", "iou_random", "iou95_top10", "iou95_ceiling", "auprc_top10", "auprc_chance")
    rows: list[list[float]] = []
    found = unbiased(count, 4 * 10**6)
    jobs: list[tuple[int, str, Sequence[mmn.Neuron]]] = []
    for start in tqdm(range(0, len(found), batch), desc="heatmaps", leave=False):
        part = found[start : start + batch]
        for offset, trace in enumerate(vlm.caption([s.image for s in part], batch_size=batch)):
            scene = part[offset]
            for noun, ranking in mmn.rank(vlm, trace, k=20).items():
                if noun not in scene.names:
                    continue
                top = ranking.neurons[:10]
                others = mmn.same_layer_random(vlm, top, draws=draws, seed=scene.seed)
                heat = mmn.heatmap(vlm, trace, [*top, *itertools.chain(*others)])
                grids = heat.grid.unflatten(0, (draws + 1, 10)).mean(dim=1)  # the top 10, then each draw
                maps = replace(heat, grid=grids).on_image(per_neuron=True)
                mask = scene.mask(noun)
                ious = [metrics.iou(metrics.by_area(each, int(mask.sum())), mask) for each in maps]
                at95 = metrics.iou(maps[0] > np.percentile(maps[0], 95), mask)
                share = float(mask.mean())
                precise = metrics.auprc(maps[0], mask)
                rows.append([ious[0], float(np.mean(ious[1:])), at95, metrics.iou_ceiling(share), precise, share])
                jobs.append((start + offset, noun, ranking.neurons))
                jobs.append((start + offset, noun, mmn.same_layer_random(vlm, ranking.neurons, draws=1, seed=len(jobs))[0]))
    if not jobs:
        raise MmnError("The model named no object that is in its picture, so there are no neurons to look at; is it trained?")
    gone: list[bool] = []
    for start in tqdm(range(0, len(jobs), batch), desc="flips", leave=False):
        some = jobs[start : start + batch]
        with mmn.zero(vlm, [list(neurons) for _, _, neurons in some]):
            traces = vlm.caption([found[index].image for index, _, _ in some], batch_size=batch, record=False)
        gone += [noun not in scenes.mentions(trace.text) for trace, (_, noun, _) in zip(traces, some, strict=True)]
    by_scene = [index for index, _, _ in jobs[::2]]
    columns = np.concatenate([np.array(rows), np.reshape(gone, (-1, 2)).astype(float)], axis=1).T
    names = (*keys, "flip_top20", "flip_random20")
    frame = pd.DataFrame(dict(zip(names, columns, strict=True))).assign(picture=by_scene)
    return {name: properties.clustered(frame, name) for name in names}


def cost_figures(vlm: mmn.VLM) -> dict[str, Interval]:
    """Weights on disk in MB (10^6 bytes) and seconds to caption one picture alone, 2 CPU threads."""
    folder = Path(vlm.model.config._name_or_path)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seconds = []
    try:
        for scene in scenes.sample(20, first=5 * 10**6):
            start = time.perf_counter()
            vlm.caption(scene.image, record=False)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {"megabytes": Interval(size, size, size), "seconds_per_caption": metrics.bootstrap(seconds, metrics.mean)}


def evaluate(vlm: mmn.VLM, count: int = 1000, batch: int = 32) -> dict[str, Interval]:
    """Every figure of the table, by key, with its 95 % interval over scenes."""
    return {
        **caption_figures(vlm, count, batch),
        **answer_figures(vlm, count, batch),
        **neuron_figures(vlm, count, batch),
        **cost_figures(vlm),
    }


def table(figures: dict[str, Interval]) -> str:
    """The figures as aligned lines, each with its interval, chance level and bar."""
    lines = [f"{'figure':<22}{'value':>8}   {'95 % interval':<18}{'chance':>7}   must be"]
    for key, bar in TARGETS.items():
        value = figures[key]
        chance = f"{CHANCE[key]:.2f}" if key in CHANCE else ""
        lines.append(f"{key:<22}{value.value:>8.3f}   {f'[{value.low:.3f}, {value.high:.3f}]':<18}{chance:>7}   {bar}")
    return "\n".join(lines)


def record(vlm: mmn.VLM, figures: dict[str, Interval], count: int) -> dict[str, object]:
    """The figures with everything that tells where they come from: model hash, scenes, versions, command."""
    return {
        "command": f"mmn evaluate --model {vlm.name} --scenes {count}",
        "model_hash": vlm.hash,
        "scenes": count,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
        **{key: value.value for key, value in figures.items()},
        "intervals": {key: [value.low, value.high] for key, value in figures.items()},
        "chance": CHANCE,
        "must_be": TARGETS,
    }


def around_figures(card: Path) -> tuple[str, str]:
    """What stands before and behind the figures of a model card, marks included. Raises MmnError for a card without the marks."""
    start, end = "<!-- figures -->", "<!-- end of figures -->"
    old = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if start not in old or end not in old:
        raise MmnError(f"{card} has no lines {start!r} and {end!r} to put the figures between.")
    return old[: old.index(start)] + start, old[old.index(end) :]


def write_card(card: Path, text: str, model_hash: str) -> None:
    """Put the table between the marks of a model card. Raises MmnError for a card without the marks."""
    before, behind = around_figures(card)
    put(card, f"{before}\nModel hash `{model_hash}`.\n\n```text\n{text}\n```\n{behind}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn evaluate`."""
    parser.add_argument("--model", default="tiny-llava", help="shipped model or checkpoint folder")
    parser.add_argument("--scenes", type=at_least(1), default=1000, help="fresh scenes for each figure")
    parser.add_argument("--batch", type=at_least(1), default=32)
    parser.add_argument("--device", help="cpu or cuda; the default is the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--card", type=a_path, help="also write the table into this model card, between its marks")
    parser.add_argument("--out", type=a_path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    """`mmn evaluate`."""
    if args.card:
        around_figures(args.card)  # refused before hours of work
    vlm = mmn.load(args.model, device_map=args.device)
    figures = evaluate(vlm, args.scenes, args.batch)
    text = json.dumps(record(vlm, figures, args.scenes), indent=1, ensure_ascii=False)
    if args.out:
        put(args.out, text + "\n")
    if args.card:
        write_card(args.card, table(figures), vlm.hash)
    print(text if args.json else table(figures))
    return 0
