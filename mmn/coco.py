"""The objects of COCO in the words of a sentence: what CHAIR counts in captions, and where a noun's mask is to be looked for.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) reads a caption by a list of words for each of the 80 categories. Its authors' list is not
ours to ship: where it lies as `synonyms.txt` beside the annotations it is used, so that figures compare with published ones; else `WORDS`,
which is shorter and this project's own. What their code does besides is done here, too: a name of two words is one object (`hot dog` is no
dog), `baby elephant` is no person, `passenger train` neither, and `toilet seat` is no chair."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mmn.errors import MmnError
from mmn.nouns import Found, Lexicon

WORDS = """
person, man, woman, boy, girl, child, kid, baby, toddler, infant, adult, people, lady, gentleman
person, guy, crowd, passenger, pedestrian, driver, rider, player, skier, snowboarder, skateboarder, surfer, chef, cook
person, worker, officer, policeman, fireman, soldier, tourist, couple, family, mother, father, bride, groom, cyclist
person, batter, pitcher, catcher, umpire, spectator
bicycle, bike
car, automobile, sedan, taxi, cab, suv, minivan, jeep
motorcycle, motorbike, motor bike, motor cycle, moped, scooter
airplane, plane, aeroplane, air plane, aircraft, airliner, jet, jetliner, biplane
bus, minibus, double decker, double decker bus, trolleybus
train, locomotive, tram, subway train
truck, lorry, pickup, pickup truck, fire truck, tow truck, van
boat, ship, sailboat, canoe, kayak, ferry, rowboat, yacht, motorboat, dinghy
traffic light, traffic signal, stop light, stoplight, street light
fire hydrant, hydrant
stop sign
parking meter
bench, park bench
bird, duck, goose, seagull, gull, pigeon, parrot, owl, swan, pelican, eagle, rooster, hen, sparrow, flamingo, penguin
cat, kitten, kitty
dog, puppy, pup
horse, pony, foal, colt, mare
sheep, lamb, ram, ewe
cow, cattle, bull, calf, ox, steer
elephant
bear, cub, polar bear, grizzly
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse, tote bag
tie, necktie, bow tie
suitcase, suit case, luggage
frisbee, flying disc
skis, ski
snowboard
sports ball, ball, baseball, soccer ball, football, basketball, tennis ball, volleyball
kite
baseball bat, bat
baseball glove, glove, mitt, catcher's mitt
skateboard
surfboard, surf board
tennis racket, racket, racquet, tennis racquet
bottle, wine bottle, beer bottle
wine glass, wineglass
cup, mug, glass, teacup, coffee cup
fork
knife
spoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, sub
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut, bagel
cake, cupcake, cheesecake, birthday cake
chair, armchair, stool, recliner, seat
couch, sofa, loveseat, futon
potted plant, houseplant, house plant, plant
bed, bunk bed
dining table, table, desk, coffee table, kitchen table
toilet, urinal, commode
tv, television, television set, tv set
laptop, laptop computer, notebook computer
mouse, computer mouse
remote, remote control
keyboard, computer keyboard
cell phone, cellphone, mobile phone, smartphone, phone, iphone
microwave, microwave oven
oven, stove, stove top oven
toaster
sink, washbasin
refrigerator, fridge
book, novel, textbook
clock, clock tower, alarm clock
vase
scissors
teddy bear, teddy, stuffed bear
hair drier, hair dryer, hairdryer, blow dryer
toothbrush
"""
YOUNG = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")  # of which `baby` tells the age
PLURALS = {"person": "people", "people": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen", "sheep": "sheep",
           "cattle": "cattle", "knife": "knives", "calf": "calves", "skis": "skis", "scissors": "scissors"}  # fmt: skip
RIDDEN = ("airplane", "train")  # of which `passenger` tells the kind


def words(folder: Path) -> dict[str, str]:
    """Word -> category: of CHAIR's own list where `folder`, that of the annotations, holds `synonyms.txt`, else of `WORDS`.

    A line is a category and words for it, with commas between. Raises MmnError for a list of another form."""
    path = folder / "synonyms.txt"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else WORDS
    except (OSError, ValueError) as error:
        raise MmnError(f"{path} cannot be read ({error}): get it again, or take it away.") from None
    rows = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in text.splitlines() if line.strip()]
    found = {word: row[0] for row in rows for word in row}
    if len({row[0] for row in rows if row}) < 2:
        raise MmnError(
            f"{path} names fewer than two categories: each of its lines is one, and the words for it, with commas between."
        )
    for category, ages in (*((name, ("baby", "adult")) for name in YOUNG), *((name, ("passenger",)) for name in RIDDEN)):
        found |= {f"{age} {word}": category for word, of in [*found.items()] if of == category for age in ages}
    return found | {f"toilet {word}": "toilet" for word in ("seat", "lid") if "toilet" in found}


def plural(word: str) -> str:
    """The plural of an English noun, that of the last word of a name of several."""
    before, last = re.split(r"(?=\w+$)", word, maxsplit=1)
    if last in PLURALS or last.endswith(("man", "men")):
        return before + PLURALS.get(last, f"{last[:-3]}men")
    if re.search(r"[^aeiou]y$", last):
        return before + f"{last[:-1]}ies"
    return before + last + ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")


def lexicon(table: Mapping[str, str]) -> Lexicon:
    """How a sentence names the categories of a table word -> category: a function that gives each mention's text, category and span, in
    order. Singular or plural, in small letters or large; where words overlap, the first that begins counts, and of those the longest."""
    forms = {form: category for word, category in table.items() for form in (plural(word), word)}
    pattern = re.compile(
        r"\b(?:" + "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)) + r")\b", re.IGNORECASE
    )

    def categories(text: str) -> list[Found]:
        found = [(m.group(), forms[m.group().casefold()], m.span()) for m in pattern.finditer(text)]
        toilet = any(name == "toilet" for _, name, _ in found)
        return [each for each in found if not (toilet and each[0].lower() in ("seat", "seats"))]

    return categories
