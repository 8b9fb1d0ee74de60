"""Render the sprite atlas: one PNG a style, 64 x 64 RGBA cells in the order of mmn.scenes.CONCEPTS.

    npm pack @iconify-json/noto ...   (each of PACKAGES, unpacked as FOLDER/<package>/)
    python data/sprites/make_sprites.py FOLDER

Needs the PyPI package resvg_py. Users of the book do not need to run this: the atlas is shipped.
"""

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

from mmn.scenes import CONCEPTS, HELD_OUT_STYLE, LARGEST, STYLES

COLUMNS = 12
# Names under which the packages keep a concept, where they differ from the concept's own; the first one found is drawn.
ICONS = {
    "sheep": ["ewe", "sheep"],
    "car": ["automobile"],
    "truck": ["delivery-truck", "deliverytruck"],
    "boat": ["sailboat"],
    "apple": ["red-apple", "redapple"],
    "orange": ["tangerine"],
    "cherry": ["cherries"],
    "donut": ["doughnut"],
    "cake": ["birthday-cake", "birthdaycake"],
    "hot dog": ["hot-dog"],
    "pizza": ["pizza", "sliceofpizza"],
    "eggplant": ["eggplant", "aubergine"],
    "tree": ["deciduous-tree", "deciduoustree"],
    "palm tree": ["palm-tree", "palmtree"],
    "clock": ["alarm-clock", "alarmclock"],
    "laptop": ["laptop", "personalcomputer"],
    "phone": ["mobile-phone", "cellphone"],
    "book": ["green-book", "greenbook"],
    "backpack": ["backpack", "schoolsatchel"],
    "hat": ["top-hat", "tophat"],
    "tie": ["necktie", "tie"],
    "ball": ["soccer-ball", "soccerball"],
    "gift": ["wrapped-gift", "present"],
    "snowman": ["snowman-without-snow", "snowmanwithoutsnow"],
    "house": ["house", "housebuilding"],
    "traffic light": ["vertical-traffic-light", "verticaltrafficlight"],
    "stop sign": ["stop-sign"],
    "knife": ["kitchen-knife", "hocho"],
    "cigarette": ["cigarette", "smokingsymbol"],
    "beer": ["beer-mug", "beermug"],
    "wine": ["wine-glass", "wineglass"],
    "motorcycle": ["motorcycle"],
    "rabbit": ["rabbit-face", "bunny"],
    "cat": ["cat-face", "cat"],
    "dog": ["dog-face", "dog"],
    "horse": ["horse", "horse-face"],
    "cow": ["cow-face", "cowface"],
    "monkey": ["monkey-face", "monkeyface"],
    "pig": ["pig-face", "pig"],
    "tiger": ["tiger-face", "tiger"],
    "chair": ["chair", "seat"],
}


def render(package: Path, concept: str) -> Image.Image | None:
    """One picture of 64 x 64 pixels, or None where the package lacks the concept."""
    data = json.loads((package / "icons.json").read_text())
    aliases = {name: alias["parent"] for name, alias in data.get("aliases", {}).items()}
    for name in ICONS.get(concept, [concept]):
        name = aliases.get(name, name)
        if name in data["icons"]:
            icon = data["icons"][name]
            left, top = icon.get("left", data.get("left", 0)), icon.get("top", data.get("top", 0))
            width = icon.get("width", data.get("width", 16))
            height = icon.get("height", data.get("height", 16))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * LARGEST, height=4 * LARGEST))
            return fit(Image.open(io.BytesIO(png)).convert("RGBA"))
    return None


def fit(picture: Image.Image) -> Image.Image:
    """Crop the empty margin and fit into the cell, so that an object is as large as its box says."""
    picture = picture.crop(picture.getbbox())
    scale = LARGEST / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    cell = Image.new("RGBA", (LARGEST, LARGEST))
    cell.paste(picture.resize(size, Image.Resampling.BOX), ((LARGEST - size[0]) // 2, (LARGEST - size[1]) // 2))
    return cell


def main(folder: Path) -> None:
    for style in (*STYLES, HELD_OUT_STYLE):
        rows = -(-len(CONCEPTS) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * LARGEST, rows * LARGEST))
        missing = []
        for index, concept in enumerate(CONCEPTS):
            picture = render(folder / style, concept)
            if picture is None:
                missing.append(concept)
            else:
                sheet.paste(picture, (LARGEST * (index % COLUMNS), LARGEST * (index // COLUMNS)))
        sheet.save(Path(__file__).parent / f"{style}.png", optimize=True)
        print(f"{style}: {len(CONCEPTS) - len(missing)} concepts, without {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
