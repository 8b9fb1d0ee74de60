"""`mmn atlas`: every neuron of a model on one page: the words it writes, the pictures that excite it and where, the concept it stands for.

Pictures stream through the model once; of each only the highest activation of every neuron is kept, and the grids of the few best. The
vocabulary is multiplied with a block of neurons at a time. So memory grows with neurons times pictures kept, not with the vocabulary.

- **concept**: the one whose pictures its highest activation tells best from others, by AUROC, where that is at least `SURE`; only where it
  is known what pictures show. How many neurons would pass by chance is measured with shuffled pictures and said on the page.
- **picture or text**: `(p - t) / (p + t)`, p and t the means, over pictures and over texts without one, of its highest positive activation.
- **effect**: what silencing it alone takes from log p of its concept's word, nats, on one picture whose caption says it."""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

import mmn
from mmn import gallery, properties, scenes
from mmn.anatomy import image_grid
from mmn.arguments import a_path, at_least
from mmn.errors import MmnError
from mmn.ffn import Neuron
from mmn.hooks import hooked
from mmn.images import scenes_only
from mmn.paths import put
from mmn.semantics import token_text, top_token_ids

if TYPE_CHECKING:
    from mmn.sources import Picture
    from mmn.vlm import VLM

PAGE = Path(__file__).with_name("atlas.html")
BEST = 4  # pictures of a neuron
WORDS = 8  # tokens of a neuron
SURE = 0.95  # AUROC from which on a neuron is said to stand for a concept
LEAST = 4  # pictures that must show a concept
TILE = 72  # pixels of a picture's side on the page
LEVELS = 15  # of heat on the page
BLOCK = 512  # neurons ranked at once


@dataclass(frozen=True, eq=False)
class Best:
    """The pictures that excite every neuron of a layer most. values: highest activations `[BEST, neurons]`, falling. which: pictures,
    int16 `[BEST, neurons]`. grids: heat at the image positions in steps of `values` / LEVELS, two positions to a byte, uint8
    `[BEST, half of the positions, neurons]`."""

    values: Tensor
    which: Tensor
    grids: Tensor
    positions: int

    def heat(self, unit: int) -> Tensor:
        """One neuron's heat, uint8 `[BEST, positions]`."""
        grids = self.grids[..., unit]
        return torch.stack((grids >> 4, grids & LEVELS), -1).flatten(1)[:, : self.positions]

    def of(self, unit: int) -> dict[str, Any]:
        """One neuron's pictures, its highest activation on each, and the heat of all as `_packed`."""
        filled = self.values[:, unit] > 0
        peaks = [round(float(value), 2) for value in self.values[filled, unit]]
        return {"pictures": self.which[filled, unit].tolist(), "peaks": peaks, "heat": _packed(self.heat(unit)[filled].numpy())}


class Opened(Sequence[Image.Image]):
    """Pictures that are read from disk when they are asked for, so that not all are in memory at once."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: Any) -> Any:
        return [picture.open() for picture in self.pictures[place]] if isinstance(place, slice) else self.pictures[place].open()


@torch.no_grad()
def excited(vlm: VLM, images: Sequence[Image.Image], batch_size: int = 16) -> tuple[list[Best], Tensor]:
    """One `Best` a layer, and every neuron's highest activation on every picture, float16 `[pictures, neurons]`.

    Raises MmnError for pictures that differ in their number of image tokens, and for a model that has no image positions."""
    sizes = vlm.anatomy.neurons
    highest = torch.zeros(len(images), sum(sizes), dtype=torch.float16)
    starts = np.cumsum([0, *sizes])
    best: list[Best | None] = [None] * len(sizes)

    def reader(picture: int, layer: int, activations: Tensor) -> None:
        values = activations.float().cpu()
        peak = values.amax(0)
        highest[picture, starts[layer] : starts[layer + 1]] = peak.clamp(-6e4, 6e4).half()
        kept = best[layer]
        if kept is None:
            kept = best[layer] = Best(
                torch.zeros(BEST, len(peak)), torch.full((BEST, len(peak)), -1, dtype=torch.int16),
                torch.zeros(BEST, -(-len(values) // 2), len(peak), dtype=torch.uint8), len(values),
            )  # fmt: skip
        if len(values) != kept.positions:
            raise MmnError("The pictures differ in their number of image tokens: give pictures of one size.")
        slot = kept.values.argmin(0)
        new = (peak > kept.values.gather(0, slot[None])[0]).nonzero()[:, 0]
        if len(new):
            at = slot[new]
            kept.values[at, new] = peak[new]
            kept.which[at, new] = picture
            levels = torch.zeros(2 * kept.grids.shape[1], len(new), dtype=torch.uint8)
            levels[: len(values)] = (values[:, new] / peak[new] * LEVELS).clamp(0, LEVELS).round()
            kept.grids[at, :, new] = (levels[::2] << 4 | levels[1::2]).T

    gallery.read_pictures(vlm, images, reader, batch_size)
    kept = [each for each in best if each is not None]
    best.clear()  # so that no layer is in memory twice
    for layer, each in enumerate(kept):
        kept[layer] = _sorted(each)
    return kept, highest


def _sorted(best: Best) -> Best:
    order = best.values.argsort(0, descending=True)
    grids = best.grids.gather(0, order[:, None].expand(-1, best.grids.shape[1], -1))
    return Best(best.values.gather(0, order), best.which.gather(0, order), grids, best.positions)


@torch.no_grad()
def on_texts(vlm: VLM, texts: Sequence[str]) -> Tensor:
    """Every neuron's highest positive activation on a text without a picture, mean over texts: float32 `[neurons]`."""
    total = [torch.zeros(size) for size in vlm.anatomy.neurons]

    def add(layer: int, activations: Tensor) -> None:
        total[layer] += activations[0].amax(0).float().cpu().clamp(min=0) / len(texts)

    for text in texts:
        with hooked(ffn.watch(partial(add, layer)) for layer, ffn in enumerate(vlm.anatomy.ffns)):
            vlm.model(**vlm.inputs([None], [text], [""]), use_cache=False)
    return torch.cat(total)


def aurocs(highest: Tensor, shown: np.ndarray) -> np.ndarray:
    """AUROC of every neuron for every concept, `[concepts, neurons]`: highest `[pictures, neurons]`, shown bool
    `[concepts, pictures]`. From mean ranks (Mann and Whitney's U)."""
    counts = shown.sum(1)
    wins = shown @ rankdata(highest.float().numpy(), axis=0) - (counts * (counts + 1) / 2)[:, None]
    return wins / (counts * (len(highest) - counts))[:, None]


def told(highest: Tensor, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every neuron's highest AUROC, float32 `[neurons]`, and the place of the concept it is of, in blocks of neurons; 0 where there
    are no concepts."""
    sure, place = np.zeros(highest.shape[1], np.float32), np.zeros(highest.shape[1], np.int64)
    for start in range(0, highest.shape[1] if len(shown) else 0, BLOCK):
        table = aurocs(highest[:, start : start + BLOCK], shown)
        sure[start : start + BLOCK], place[start : start + BLOCK] = table.max(0), table.argmax(0)
    return sure, place


def effects(vlm: VLM, neurons: dict[Neuron, str], pictures: Sequence[Picture], batch_size: int = 4) -> dict[Neuron, float]:
    """Drop of log p of a neuron's concept when it alone is silent, nats, on the first picture that shows the concept and whose
    caption says it. Neurons of concepts that no caption says are left out."""
    cases: dict[str, properties.Case] = {}
    wanted = set(neurons.values())
    rest = iter(pictures)
    while sought := wanted - set(cases):
        some = list(islice((picture for picture in rest if sought & set(picture.objects or ())), batch_size))
        if not some:
            break
        for case in properties.cases(vlm, [picture.open() for picture in some]):
            if case.lemma in sought and case.lemma in (some[case.picture].objects or ()):
                cases.setdefault(case.lemma, case)
    found: dict[Neuron, float] = {}
    for concept, case in cases.items():
        mine = [neuron for neuron, name in neurons.items() if name == concept]
        table = properties.effects(vlm, case, {str(place): [neuron] for place, neuron in enumerate(mine)})
        found |= dict(zip(mine, table["drop"], strict=True))
    return found


def compute(vlm: VLM, pictures: Sequence[Picture], *, most: int = 6000, seed: int = 0, batch_size: int = 4) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it; at most `most` neurons, those that tell a concept best, then the most excited.

    Raises MmnError for no pictures, and as `excited`."""
    if not pictures:
        raise MmnError("There are no pictures to show to the neurons: give at least one.")
    images = Opened(pictures)
    best, highest = excited(vlm, images, batch_size)
    names = sorted({name for picture in pictures for name in picture.objects or ()})
    shown = np.array([[name in (picture.objects or ()) for picture in pictures] for name in names], bool)
    shown = shown.reshape(len(names), len(pictures))  # also where nothing is known of any
    enough = shown.sum(1) >= LEAST
    names, shown = [name for name, keep in zip(names, enough, strict=True) if keep], shown[enough]
    sure, place = told(highest, shown)
    by_chance = int((told(highest, shown[:, np.random.default_rng(seed).permutation(len(pictures))])[0] >= SURE).sum())
    asked = [fact.text for fact in scenes.facts()[:: max(1, len(scenes.facts()) // 48)]]
    text = on_texts(vlm, asked).numpy()
    seen = highest.clamp(min=0).mean(0, dtype=torch.float32).numpy()
    peak = torch.cat([each.values[0] for each in best]).numpy()
    order = np.lexsort((-peak, -np.where(sure >= SURE, sure, 0)))
    chosen = np.sort(order[: min(most, len(order))])
    chosen = chosen[peak[chosen] > 0]
    neurons = properties.neurons_at(tuple(vlm.anatomy.neurons), chosen)
    seen_by = [best[neuron.layer].of(neuron.unit) for neuron in neurons]
    layers, positions = len(best), best[0].positions
    del best, highest  # the largest things here; what follows needs memory of its own
    concepts = {neuron: names[place[n]] for neuron, n in zip(neurons, chosen, strict=True) if names and sure[n] >= SURE}
    drops = effects(vlm, concepts, pictures, batch_size)
    ids, weights = top_token_ids(vlm, neurons, WORDS)
    rows: list[dict[str, Any]] = []
    for row, (neuron, n) in enumerate(zip(neurons, chosen, strict=True)):
        share = (seen[n] - text[n]) / max(seen[n] + text[n], 1e-9)
        rows.append(
            {
                "layer": neuron.layer,
                "unit": neuron.unit,
                "words": ids[row].tolist(),
                "weights": [round(float(value), 2) for value in weights[row]],
                **seen_by[row],
                "side": round(float(share), 2),
                **({"concept": names.index(concepts[neuron]), "auroc": round(float(sure[n]), 3)} if neuron in concepts else {}),
                **({"effect": round(float(drops[neuron]), 3)} if neuron in drops else {}),
            }
        )
    inputs = vlm.inputs(images[:1], [vlm.prompt], [mmn.PREFIX])
    grid = image_grid(positions, inputs)
    words = sorted({token for row in rows for token in row["words"]})
    about = {
        "model": vlm.name, "hash": vlm.hash, "total": vlm.anatomy.total, "layers": layers, "sure": SURE, "passed": len(concepts),
        "by_chance": by_chance, "pictures": len(pictures), "texts": len(asked),
    }  # fmt: skip
    sheet, tiles = _sheet(images)
    return {
        "about": about, "concepts": names, "tokens": {str(token): token_text(vlm, token) for token in words}, "grid": grid,
        "levels": LEVELS, "tile": TILE, "columns": tiles, "sheet": sheet, "neurons": rows,
        "shows": [[names.index(name) for name in picture.objects or () if name in names] for picture in pictures],
    }  # fmt: skip


def _packed(grids: np.ndarray) -> str:
    """Heat of 16 levels, two to a byte, as base64."""
    flat = grids.ravel()
    flat = np.append(flat, 0) if len(flat) % 2 else flat
    return base64.b64encode((flat[::2] << 4 | flat[1::2]).astype(np.uint8).tobytes()).decode()


def _sheet(images: Sequence[Image.Image]) -> tuple[str, int]:
    """All pictures as tiles of one JPEG, as a data address, and how many stand in a row."""
    columns = int(np.ceil(np.sqrt(len(images))))
    whole = Image.new("RGB", (columns * TILE, -(-len(images) // columns) * TILE))
    for number, image in enumerate(images):
        whole.paste(
            image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (number % columns * TILE, number // columns * TILE)
        )
    out = io.BytesIO()
    whole.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode(), columns


def page(found: dict[str, Any]) -> str:
    """The page that shows what `compute` found, with nothing to fetch."""
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return PAGE.read_text(encoding="utf-8").replace("{{data}}", data)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmn atlas`."""
    parser.add_argument("--model", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
    parser.add_argument("--images", default="scenes", help="scenes, a folder, or what `mmn fetch` left (default: %(default)s)")
    parser.add_argument("--count", type=at_least(1), default=400, help="pictures at most (default: %(default)s)")
    parser.add_argument("--most", type=at_least(1), default=6000, help="neurons on the page at most (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pictures at once (default: %(default)s)")
    parser.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
    parser.add_argument("--dtype", default="float32", help="e.g. bfloat16 (default: %(default)s)")
    parser.add_argument("--out", type=a_path, required=True, help="file of the page, *.html")


def run(args: argparse.Namespace) -> int:
    """`mmn atlas`. Raises MmnError for bad input."""
    from mmn import sources, stages

    notes = stages.Notes("atlas")
    listed = sources.load(sources.absolute(args.images), args.count, args.seed)
    pictures = [picture for picture, _ in stages.opened(listed, notes)]
    for row in notes.rows:
        print(f"left out: {row['problem']}", file=sys.stderr)
    vlm = mmn.load(args.model, device_map=args.device_map, dtype=args.dtype)
    if args.images != "scenes" and (note := scenes_only(vlm)):
        print(note, file=sys.stderr)
    found = compute(vlm, pictures, most=args.most, seed=args.seed, batch_size=args.batch)
    put(args.out, page(found))
    about = found["about"]
    print(f"{len(found['neurons'])} of {about['total']} neurons, {about['passed']} with a concept ({about['by_chance']} by chance)")
    print(f"Written to {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0
