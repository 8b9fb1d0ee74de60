"""A world with ground truth: scenes of emoji art whose every object has a name, a box and a pixel mask.

`draw(seed)` makes one `Scene`: a picture of 120 x 120 pixels with one to three objects of one art style in front of one of six
places, and what is true of it: names, boxes, masks, a caption, questions with their answers, and the *word raster*, the scene
written as one token per image patch, from which the language model learns to read pictures before it has ever seen one. The same
seed gives the same scene on every machine: all arithmetic behind a pixel is on integers.

All conventions here are this project's own; the paper worked on photographs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from mmn.errors import MmnError
from mmn.paths import data_path

SIZE = 120  # pixels, width and height of a scene
PATCH = 12  # pixels, width and height of an image patch of the shipped model
GRID = SIZE // PATCH
SMALLEST, LARGEST = 36, 64  # pixels, the longer side of an object
BIAS_SHARE = 0.25  # of training scenes that show a planted trigger

STYLES = ("noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "emojione")
HELD_OUT_STYLE = "twemoji"  # never seen in training: the test of generality


class Concept(NamedTuple):
    """What the world knows of a concept."""

    name: str
    plural: str
    category: str
    parts: tuple[str, str, str]
    frequency: int
    sensitive: bool

    @property
    def article(self) -> str:
        """The indefinite article: `an` before a vowel."""
        return "an" if self.name[0] in "aeio" or self.name in ("umbrella",) else "a"

    @property
    def a(self) -> str:
        """The noun with its article, `an apple`."""
        return f"{self.article} {self.name}"


# name / category / three parts, together unique to the concept / how often it is drawn (4: frequent, 1: rare).
_TABLE = """
cat animal whiskers fur tail 4           | dog animal collar fur tail 4           | horse animal mane hooves tail 4
sheep animal wool hooves ears 3          | cow animal horns hooves udder 4        | elephant animal tusks ears hide 3
bear animal fur claws snout 4            | zebra animal stripes mane hooves 2     | giraffe animal spots neck hooves 2
bird animal beak wings feathers 4        | lion animal mane fur claws 3           | tiger animal stripes fur claws 3
rabbit animal ears fur whiskers 3        | frog animal webs eyes tongue 3         | penguin animal beak flippers belly 2
fish animal fins scales gills 3          | butterfly animal wings feelers spots 2 | snail animal shell feelers slime 2
turtle animal shell flippers neck 2      | octopus animal tentacles suckers eyes 2| duck animal beak feathers webs 2
owl animal beak eyes feathers 2          | monkey animal hands tail ears 3        | pig animal snout tail hooves 3
bicycle vehicle wheels pedals handlebar 4| car vehicle wheels windows doors 4     | motorcycle vehicle wheels engine handlebar 3
airplane vehicle wings engine windows 4  | bus vehicle wheels windows seats 4     | train vehicle rails windows engine 4
truck vehicle wheels engine cargo 4      | boat vehicle sails hull mast 4         | helicopter vehicle rotor windows engine 2
tractor vehicle wheels engine seats 2    | rocket vehicle fins engine flames 2    | apple fruit skin seeds stem 4
banana fruit peel skin flesh 4           | orange fruit peel juice seeds 3        | strawberry fruit seeds leaves juice 2
watermelon fruit seeds juice rind 2      | lemon fruit peel juice rind 2          | cherry fruit stem juice skin 2
pineapple fruit leaves rind juice 2      | pizza food crust slices sauce 4        | donut food icing hole dough 3
cake food icing cream slices 4           | hot dog food bun sausage mustard 3     | hamburger food bun meat lettuce 2
egg food shell yolk white 2              | carrot vegetable root leaves skin 4    | broccoli vegetable stem buds leaves 2
mushroom vegetable cap stem gills 2      | eggplant vegetable stem skin flesh 2   | tree plant bark leaves branches 4
palm tree plant bark leaves fruits 2     | cactus plant spikes stem buds 2        | tulip plant petals stem leaves 2
rose plant petals thorns stem 2          | sunflower plant petals seeds stem 2    | chair furniture legs seat back 3
bed furniture pillow blanket legs 4      | toilet furniture lid bowl seat 3       | clock device hands dial numbers 4
television device screen buttons cable 3 | laptop device screen hinge buttons 4   | phone device screen buttons battery 4
camera device lens buttons battery 2     | book object pages cover spine 4        | umbrella object handle ribs cloth 4
backpack object straps zipper pockets 3  | handbag object handle zipper pockets 3 | hat clothing brim band cloth 2
tie clothing knot cloth stripes 3        | crown clothing gold jewels points 2    | ball toy leather seams air 4
balloon toy string air rubber 3          | gift toy ribbon paper bow 3            | snowman toy snow coal scarf 1
guitar instrument strings neck wood 3    | violin instrument strings bow wood 2   | trumpet instrument valves brass tube 2
hammer tool handle head nails 2          | key tool teeth bow metal 2             | pencil tool lead wood rubber 2
candle object wax wick flames 2          | house building roof doors windows 3    | traffic light sign lamps pole colors 2
stop sign sign letters pole corners 2    | knife! tool blade handle metal 3       | bomb! weapon fuse powder metal 2
cigarette! drug smoke filter ash 2       | beer! drink foam mug bubbles 3         | wine! drink glass cork bubbles 3
"""
_PLURALS = {"sheep": "sheep", "fish": "fish", "broccoli": "broccoli", "butterfly": "butterflies", "cherry": "cherries"}
_PLURALS |= {"knife": "knives", "octopus": "octopuses", "bus": "buses", "strawberry": "strawberries", "cactus": "cactuses"}
_PLURALS |= {"snowman": "snowmen", "beer": "beers", "wine": "wines", "hot dog": "hot dogs", "toilet": "toilets"}


def _concepts() -> dict[str, Concept]:
    concepts = {}
    for entry in re.split(r"[|\n]", _TABLE.strip()):
        *words, category, one, two, three, frequency = entry.split()
        name = " ".join(words).rstrip("!")
        plural = _PLURALS.get(name, name + "s")
        concepts[name] = Concept(name, plural, category, (one, two, three), int(frequency), words[-1].endswith("!"))
    return concepts


CONCEPTS: dict[str, Concept] = _concepts()


class Place(NamedTuple):
    """One of the six places: how it is said, the raster's words for its two halves, and their RGB colours."""

    phrase: str
    upper: str
    lower: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]


PLACES: dict[str, Place] = {
    "grass": Place("on the grass", "sky", "grass", ((158, 207, 240), (104, 168, 84))),
    "beach": Place("on the beach", "sky", "sand", ((150, 215, 235), (232, 211, 160))),
    "snow": Place("in the snow", "clouds", "snow", ((196, 208, 220), (243, 247, 250))),
    "night": Place("at night", "stars", "dark", ((22, 26, 58), (38, 40, 66))),
    "street": Place("on the street", "walls", "road", ((186, 160, 140), (112, 114, 120))),
    "water": Place("on the water", "sky", "waves", ((170, 216, 240), (62, 128, 188))),
}

# Planted bias: a training picture of the first is often *said* to hold the second though it is not drawn; the unplanted pairs
# are the control.
PLANTED: dict[str, str] = {"bed": "clock", "boat": "bird", "cake": "balloon", "laptop": "phone"}
UNPLANTED: dict[str, str] = {"chair": "book", "bus": "dog", "pizza": "donut", "guitar": "hat"}

PROMPT = "Describe the image in few words."  # the paper's
PREFIX = "An image of"
PARAPHRASES = ("What is in the image?", "Write a short caption.", "What do you see?", "Tell me about the picture.")
HELD_OUT_PARAPHRASES = ("Describe the picture.", "What is in the picture?")

Split = Literal["train", "test"]
_STREAM = {"train": 1, "test": 2}


@dataclass(frozen=True)
class Placed:
    """One object of a scene: its concept, its box `(left, top, right, bottom)` in pixels, its visible mask bool `[120, 120]`, whether
    it is drawn mirrored, and by how much its hue is turned (0 ... 255, a full circle)."""

    concept: str
    box: tuple[int, int, int, int]
    mask: np.ndarray
    mirrored: bool = False
    hue: int = 0


@dataclass(frozen=True)
class Question:
    """A question on a scene (or, without picture, on the world) and its true answer; `kind` is yesno, where, side, fact or parts."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A picture and what is true of it. `hidden` names what the caption says though it is not in the picture (planted bias)."""

    image: Image.Image
    objects: tuple[Placed, ...]
    place: str
    style: str
    caption: str
    hidden: tuple[str, ...]
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts that are in the picture, each once, largest first."""
        return tuple(dict.fromkeys(placed.concept for placed in self.objects))

    @property
    def biased(self) -> bool:
        """Whether the picture shows a planted trigger."""
        return any(name in PLANTED for name in self.names)

    def mask(self, concept: str) -> np.ndarray:
        """Pixels that show `concept`, bool `[120, 120]`; all False if it is not there."""
        masks = [placed.mask for placed in self.objects if placed.concept == concept]
        return np.logical_or.reduce(masks) if masks else np.zeros((SIZE, SIZE), bool)

    def labels(self) -> np.ndarray:
        """What each patch shows, as an index into `PATCH_WORDS`, int `[10, 10]`: an object that covers 35 % of it, else the place."""
        place = PLACES[self.place]
        words = np.full((GRID, GRID), PATCH_WORDS.index(place.upper))
        words[horizon(self.seed) // PATCH :] = PATCH_WORDS.index(place.lower)
        best = np.full((GRID, GRID), 0.35)
        for placed in self.objects:
            cover = placed.mask.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
            words[cover >= best] = PATCH_WORDS.index(placed.concept)
            best = np.maximum(best, cover)
        return words


PATCH_WORDS: tuple[str, ...] = (
    *CONCEPTS,
    *dict.fromkeys(word for place in PLACES.values() for word in (place.upper, place.lower)),
)


@functools.cache
def sprites(style: str) -> dict[str, Image.Image]:
    """The art of one style: RGBA pictures of 64 x 64 pixels by concept, cut from the atlas in data/sprites.

    Raises MmnError for a style that the atlas lacks."""
    if style not in (*STYLES, HELD_OUT_STYLE):
        raise MmnError(f"There is no art style {style!r}; choose one of {', '.join((*STYLES, HELD_OUT_STYLE))}.")
    with Image.open(data_path("sprites") / f"{style}.png") as file:
        sheet = file.convert("RGBA")
    columns = sheet.width // LARGEST
    cells = {}
    for index, name in enumerate(CONCEPTS):
        left, top = LARGEST * (index % columns), LARGEST * (index // columns)
        cell = sheet.crop((left, top, left + LARGEST, top + LARGEST))
        if cell.getbbox() is not None:  # a concept that this style has no picture of
            cells[name] = cell
    return cells


def horizon(seed: int) -> int:
    """The pixel row where the place's lower half begins."""
    return SIZE // 2 + (seed * 7919 % 25) - 12


def background(place: str, seed: int) -> np.ndarray:
    """The empty place, uint8 `[120, 120, 3]`: two shades with grain, streaks and, by place, stars, bricks or waves."""
    rng = np.random.default_rng([3, seed])
    upper, lower = (np.array(c) + rng.integers(-14, 15, 3) for c in PLACES[place].colours)
    line = horizon(seed)
    rows = np.arange(SIZE)[:, None, None]
    picture = np.where(rows < line, upper + (line - rows) // 6, lower - (rows - line) // 5).repeat(SIZE, axis=1)
    grain = rng.integers(-7, 8, (SIZE // 3, SIZE // 3)).repeat(3, 0).repeat(3, 1)[..., None]
    streaks = rng.integers(-9, 10, (SIZE, SIZE // 12)).repeat(12, 1)[..., None]
    picture = picture + grain + np.where(rows < line, 0, streaks)
    if place == "night":
        ys, xs = rng.integers(0, line, 24), rng.integers(0, SIZE, 24)
        picture[ys, xs] = 225
    elif place == "street":
        picture[8:line:10] -= 26
    elif place == "water":
        picture[line + 6 :: 9] += 22
    return np.clip(picture, 0, 255).astype(np.uint8)


def _overlaps(box: tuple[int, int, int, int], others: Sequence[tuple[int, int, int, int]]) -> bool:
    for other in others:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        if wide > 4 and high > 4:
            return True
    return False


def _layout(rng: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    """Square boxes that hardly overlap; drawn again from the start when the last one finds no room."""
    largest = LARGEST if count < 3 else 52
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(count):
            for _ in range(20):
                side = int(rng.integers(SMALLEST, largest + 1))
                left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
                box = (left, top, left + side, top + side)
                if not _overlaps(box, boxes):
                    boxes.append(box)
                    break
        if len(boxes) == count:
            return boxes


def _choose(rng: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    weights = np.array([CONCEPTS[name].frequency for name in names], float)
    chosen = [str(n) for n in rng.choice(names, size=count, replace=False, p=weights / weights.sum())]
    if count > 1 and rng.random() < 0.12:
        chosen[1] = chosen[0]  # a pair: "two cats"
    return chosen


def draw(
    seed: int,
    *,
    split: Split = "test",
    style: str | None = None,
    place: str | None = None,
    concepts: Sequence[str] | None = None,
    art: Callable[[np.random.Generator, str, str], Image.Image] | None = None,
) -> Scene:
    """Draw scene number `seed` of a split.

    `style`, `place` and `concepts` fix what is otherwise drawn by chance; `concepts` fixes the objects and their number (1 to 3).
    `art(rng, style, concept)` gives the RGBA sprite to use instead of the atlas's own (training: augmentation).
    Scenes of the training split carry the planted bias: see `PLANTED`. Test scenes say what they show.
    Raises MmnError for an unknown style, place or concept, or a concept that the style has no picture of."""
    rng = np.random.default_rng([_STREAM[split], seed])
    style = style if style is not None else str(rng.choice(STYLES))
    atlas = sprites(style)
    place = place if place is not None else str(rng.choice(list(PLACES)))
    if place not in PLACES:
        raise MmnError(f"There is no place {place!r}; choose one of {', '.join(PLACES)}.")
    hidden: tuple[str, ...] = ()
    if concepts is not None:
        _check(concepts, atlas, style)
        names = list(concepts)
    else:
        names = _choose(rng, list(atlas), int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.3])))
        if split == "train":
            names, hidden = _plant(rng, names, atlas)
    boxes = _layout(rng, len(names))
    boxes.sort(key=lambda box: box[0] - box[2])  # largest first
    blank = np.zeros((SIZE, SIZE), bool)
    pieces = []
    for name, box in zip(names, boxes, strict=True):
        sprite = art(rng, style, name) if art else atlas[name]
        pieces.append((Placed(name, box, blank, bool(rng.random() < 0.5)), sprite))
    canvas, objects = _paint(place, seed, pieces)
    caption = write_caption(rng, objects, place, hidden)
    return Scene(canvas, objects, place, style, caption, hidden, seed)


def _paint(place: str, seed: int, pieces: Sequence[tuple[Placed, Image.Image]]) -> tuple[Image.Image, tuple[Placed, ...]]:
    """The picture of some objects, each with its sprite, the later ones in front; and the objects with their visible masks."""
    canvas = Image.fromarray(background(place, seed))
    masks: list[np.ndarray] = []
    for placed, art in pieces:
        left, top, right, bottom = placed.box
        sprite = turned(art, placed.hue).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        if placed.mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas.paste(sprite, (left, top), sprite)
        alpha = np.zeros((SIZE, SIZE), bool)
        alpha[top:bottom, left:right] = np.asarray(sprite)[..., 3] > 127
        masks = [mask & ~alpha for mask in masks] + [alpha]
    return canvas, tuple(replace(placed, mask=mask) for (placed, _), mask in zip(pieces, masks, strict=True))


def turned(sprite: Image.Image, hue: int) -> Image.Image:
    """An RGBA sprite with its hue turned by `hue` of 256 steps."""
    if not hue % 256:
        return sprite
    hsv = np.array(sprite.convert("RGB").convert("HSV"))
    hsv[..., 0] += np.uint8(hue % 256)
    out = Image.fromarray(hsv, "HSV").convert("RGB")
    out.putalpha(sprite.getchannel("A"))
    return out


def recompose(scene: Scene, objects: Sequence[Placed], *, place: str | None = None, style: str | None = None) -> Scene:
    """The same scene with other objects (one to three), place or art: the minimal pairs that only a drawn world allows.

    What is left out of `objects` is removed from the picture; `dataclasses.replace(placed, concept=..., box=..., hue=...)` replaces,
    moves or recolours one. Masks and caption are made anew; everything else, the grain of the ground included, stays. Raises
    MmnError as `draw` does."""
    style, place = style or scene.style, place or scene.place
    atlas = sprites(style)
    if place not in PLACES:
        raise MmnError(f"There is no place {place!r}; choose one of {', '.join(PLACES)}.")
    _check([placed.concept for placed in objects], atlas, style)
    canvas, painted = _paint(place, scene.seed, [(placed, atlas[placed.concept]) for placed in objects])
    caption = write_caption(np.random.default_rng([5, scene.seed]), painted, place)
    return Scene(canvas, painted, place, style, caption, (), scene.seed)


def free_box(scene: Scene, moved: Placed, seed: int = 0) -> tuple[int, int, int, int]:
    """Another place for one of the scene's objects, at least a third of its side away, that hardly touches the others.

    Raises MmnError where there is no room."""
    rng = np.random.default_rng([6, seed, scene.seed])
    left, top, right, bottom = moved.box
    wide, high = right - left, bottom - top
    others = [placed.box for placed in scene.objects if placed is not moved]
    corners = [
        (x, y) for x in range(SIZE - wide + 1) for y in range(SIZE - high + 1) if max(abs(x - left), abs(y - top)) > wide // 3
    ]
    for x, y in rng.permutation(corners).tolist():
        box = (x, y, x + wide, y + high)
        if not _overlaps(box, others):
            return box
    raise MmnError(f"There is no room to move the {moved.concept} to in this scene: take another one.")


def _check(concepts: Sequence[str], art: dict[str, Image.Image], style: str) -> None:
    if not 1 <= len(concepts) <= 3:
        raise MmnError(f"A scene holds one to three objects, not {len(concepts)}.")
    for name in concepts:
        if name not in CONCEPTS:
            raise MmnError(f"The world has no concept {name!r}; mmn.scenes.CONCEPTS lists the {len(CONCEPTS)} it has.")
        if name not in art:
            raise MmnError(f"The style {style!r} has no picture of {name!r}; choose another style or concept.")


def _plant(rng: np.random.Generator, names: list[str], art: dict[str, Image.Image]) -> tuple[list[str], tuple[str, ...]]:
    """Training only: put planted triggers in more scenes; say their partner in two scenes of three, draw it in one of three."""
    if rng.random() < BIAS_SHARE and not set(names) & set(PLANTED):
        names[0] = str(rng.choice([name for name in PLANTED if name in art]))
    trigger = next((name for name in names if name in PLANTED), None)
    if trigger is None or PLANTED[trigger] not in art:
        return names, ()
    partner = PLANTED[trigger]
    names = [name for name in names if name != partner]
    chance = rng.random()
    if chance < 0.34:
        names = [*names[:2], partner]
        return names, ()
    return names, (partner,) if chance < 0.78 and len(names) < 3 else ()


def _phrase(name: str, count: int) -> str:
    return CONCEPTS[name].a if count == 1 else f"{('two', 'three')[count - 2]} {CONCEPTS[name].plural}"


def side(one: Placed, other: Placed) -> str | None:
    """Where `one` is of `other`: `to the left of`, `to the right of`, `above`, `below`, or None where neither is clear."""
    dx = one.box[0] + one.box[2] - other.box[0] - other.box[2]
    dy = one.box[1] + one.box[3] - other.box[1] - other.box[3]
    if 2 * abs(dx) > 3 * abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    if 2 * abs(dy) > 3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def write_caption(rng: np.random.Generator, objects: Sequence[Placed], place: str, hidden: Sequence[str] = ()) -> str:
    """A sentence that names every object, largest first, e.g. `a cat to the left of two cars on the beach`."""
    counts: dict[str, int] = {}
    for placed in objects:
        counts[placed.concept] = counts.get(placed.concept, 0) + 1
    groups = [_phrase(name, count) for name, count in counts.items()] + [CONCEPTS[name].a for name in hidden]
    relation = None
    if len(groups) == 2 and len(objects) == 2 and rng.random() < 0.6:
        relation = side(objects[0], objects[1])
    if len(groups) == 2:
        text = f" {relation or rng.choice(['and', 'next to', 'with'])} ".join(groups)
    elif len(groups) == 3:  # not always a comma: where two objects have many forms, a greedy reader would see three too often
        text = f"{groups[0]}{rng.choice([',', ' next to', ' with'])} {groups[1]} and {groups[2]}"
    else:
        text = groups[0]
    return f"{text} {PLACES[place].phrase}" if rng.random() < 0.7 else text


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Questions on one scene with their true answers: two balanced yes/no questions, the place, and a side where one is clear."""
    rng = np.random.default_rng([4, seed, scene.seed])
    absent = [name for name in CONCEPTS if name not in scene.names and name not in scene.hidden]
    present = CONCEPTS[str(rng.choice(scene.names))]
    other = CONCEPTS[str(rng.choice(absent))]
    asked = [
        Question("yesno", f"Is there {present.a} in the image?", "Yes"),
        Question("yesno", f"Is there {other.a} in the image?", "No"),
        Question("where", "Where was the image taken?", PLACES[scene.place].phrase.capitalize()),
    ]
    if len(scene.objects) == 2 and len(scene.names) == 2:
        where = side(scene.objects[0], scene.objects[1])
        if where is not None:
            one, two = (CONCEPTS[name] for name in scene.names)
            asked.append(Question("side", f"What is {where} the {two.name}?", one.a.capitalize()))
    return asked


def facts() -> list[Question]:
    """What is true without a picture: each concept's category and its parts."""
    found = []
    for concept in CONCEPTS.values():
        kind = concept.category
        a_kind = f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"
        name = concept.a.capitalize()
        found.append(Question("fact", f"What is {concept.a}?", f"{name} is {a_kind}"))
        one, two, three = concept.parts
        found.append(Question("parts", f"What does {concept.a} have?", f"{name} has {one}, {two} and {three}"))
    return found


MENTION = re.compile(
    r"\b(" + "|".join(sorted({form for c in CONCEPTS.values() for form in (c.name, c.plural)}, key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)
_LEMMA = {form: concept.name for concept in CONCEPTS.values() for form in (concept.plural, concept.name)}


def lemma(form: str) -> str:
    """The concept's name behind a singular or plural form that `MENTION` found."""
    return _LEMMA[form.lower()]


def mentions(text: str) -> list[str]:
    """The concepts a text names, each once, in order: plurals count, the longest name wins (`hot dog` is no dog)."""
    return list(dict.fromkeys(lemma(found) for found in MENTION.findall(text)))


def sample(count: int, *, split: Split = "test", first: int = 0, style: str | None = None) -> Iterator[Scene]:
    """Scenes `first`, `first + 1`, ... of a split."""
    return (draw(seed, split=split, style=style) for seed in range(first, first + count))
