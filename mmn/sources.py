"""Where pictures come from: drawn scenes, a folder, SBU Captions, COCO. A picture is opened when it is needed, and says what is known to be
true of it.

    scenes                         drawn test scenes
    FOLDER                         picture files, by name
    sbu:FOLDER[:train|valid|test]  what `mmn fetch sbu` left; a part of the release's split
    coco:FOLDER[:val2017]          FOLDER/val2017/*.jpg and FOLDER/annotations/{instances,captions}_val2017.json"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mmn import scenes
from mmn.errors import MmnError
from mmn.fetch import split
from mmn.images import list_images, open_image


@dataclass(frozen=True)
class Picture:
    """One picture of a source. id: its name there. objects: nouns that are true of it, None if not known. captions: what people wrote of
    it. masks: gives the mask of an object, bool `[H, W]`."""

    id: str
    path: Path | None = None
    scene: scenes.Scene | None = None
    objects: tuple[str, ...] | None = None
    captions: tuple[str, ...] = ()
    masks: Callable[[str], np.ndarray] | None = field(default=None, repr=False, compare=False)

    def open(self) -> Image.Image:
        """The picture as RGB. Raises MmnError for a file that is no whole picture."""
        if self.scene is not None:
            return self.scene.image
        assert self.path is not None
        return open_image(self.path)

    def mask(self, noun: str) -> np.ndarray | None:
        """Where the noun is, bool `[H, W]`; None if that is not known."""
        if noun not in (self.objects or ()):
            return None
        return self.scene.mask(noun) if self.scene is not None else self.masks(noun) if self.masks else None


def load(images: str = "", count: int = 1000, seed: int = 0) -> list[Picture]:
    """At most `count` pictures of a source: "" or `scenes` draws test scenes (from number `seed * count` on), the others come in the order
    of their names or of the release.

    Raises MmnError where there is no such folder, no picture in it, or a file of another form."""
    if count < 1:
        raise MmnError(f"count is a number of pictures, at least 1, not {count}.")
    if images in ("", "scenes"):
        drawn = scenes.sample(count, first=seed * count)
        return [Picture(f"scene-{scene.seed}", scene=scene, objects=scene.names) for scene in drawn]
    kind, _, rest = images.partition(":")
    if kind in ("sbu", "coco") and rest:
        folder, _, part = rest.partition(":")
        return (_sbu(Path(folder), part) if kind == "sbu" else _coco(Path(folder), part or "val2017"))[:count]
    return [Picture(_readable(path.name), path=path) for path in list_images(images)[:count]]


def _readable(name: str) -> str:
    """A file's name as text that can be written: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def absolute(images: str) -> str:
    """A source whose folder is given in full, so that it can be found from anywhere."""
    if images in ("", "scenes"):
        return "scenes"
    kind, colon, rest = images.partition(":")
    if kind in ("sbu", "coco") and rest:
        folder, other, part = rest.partition(":")
        return f"{kind}{colon}{Path(folder).expanduser().resolve()}{other}{part}"
    return str(Path(images).expanduser().resolve())


def _sbu(folder: Path, part: str) -> list[Picture]:
    if not (folder / "manifest.csv").exists():
        raise MmnError(f"{folder} has no manifest.csv: fetch the pictures with `mmn fetch sbu`.")
    rows = pd.read_csv(folder / "manifest.csv", keep_default_na=False)
    rows = rows[rows["file"] != ""].reset_index(drop=True)
    if part:
        parts = split(len(rows))
        if part not in parts:
            raise MmnError(f"The release's split has the parts {', '.join(parts)}, not {part!r}.")
        rows = rows.iloc[parts[part]]
    return [Picture(row.file, folder / "images" / row.file, captions=(row.caption,)) for row in rows.itertuples()]


def _coco(folder: Path, part: str) -> list[Picture]:
    """Pictures of COCO with the names of their objects (the 80 categories) and real masks, by the official tools."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise MmnError("COCO is read with pycocotools: pip install 'mmn[data]'.") from None
    files = {kind: folder / "annotations" / f"{kind}_{part}.json" for kind in ("instances", "captions")}
    if not files["instances"].exists():
        raise MmnError(f"There is no {files['instances']}: give the folder that holds COCO's annotations/ and {part}/.")
    with contextlib.redirect_stdout(io.StringIO()):  # its tools talk
        things = COCO(str(files["instances"]))
        said = COCO(str(files["captions"])) if files["captions"].exists() else None
    names = {key: each["name"] for key, each in things.cats.items()}
    found = []
    for number in sorted(things.imgs):
        own = things.imgToAnns[number]
        objects = tuple(dict.fromkeys(names[each["category_id"]] for each in own))

        def mask(noun: str, own: list = own) -> np.ndarray:
            some = [things.annToMask(each).astype(bool) for each in own if names[each["category_id"]] == noun]
            return np.logical_or.reduce(some)

        captions = tuple(each["caption"] for each in said.imgToAnns[number]) if said else ()
        name = things.imgs[number]["file_name"]
        found.append(Picture(name, folder / part / name, objects=objects, captions=captions, masks=mask))
    return found
