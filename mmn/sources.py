"""Where pictures come from: drawn scenes, a folder, SBU Captions, COCO. A picture is opened when it is needed, and says what is known to be
true of it.

    scenes                         drawn test scenes
    FOLDER                         picture files, by name
    sbu:FOLDER[:train|valid|test]  what `mmn fetch sbu` left; a part of the release's split
    coco:FOLDER[:val2017]          FOLDER/val2017/*.jpg and FOLDER/annotations/{instances,captions}_val2017.json

A folder may have a colon in its name: the part is what follows the last one, unless all of it is a folder."""

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

from mmn import coco, scenes
from mmn.errors import MmnError
from mmn.fetch import split
from mmn.images import list_images, open_image, passed_over, readable
from mmn.nouns import Lexicon, scene_nouns


@dataclass(frozen=True)
class Picture:
    """One picture of a source. id: its name there. objects: what it shows, None if not known. captions: what people wrote of it. masks:
    gives the mask of an object, bool `[H, W]`. lexicon: how a sentence names the objects of the source, None if it knows of none."""

    id: str
    path: Path | None = None
    scene: scenes.Scene | None = None
    objects: tuple[str, ...] | None = None
    captions: tuple[str, ...] = ()
    masks: Callable[[str], np.ndarray | None] | None = field(default=None, repr=False, compare=False)
    lexicon: Lexicon | None = field(default=None, repr=False, compare=False)

    def open(self) -> Image.Image:
        """The picture as RGB. Raises MmnError for a file that is no whole picture."""
        if self.scene is not None:
            return self.scene.image
        assert self.path is not None
        return open_image(self.path)

    def mask(self, name: str) -> np.ndarray | None:
        """Where an object is, bool `[H, W]`; None if that is not known."""
        if name not in (self.objects or ()):
            return None
        return self.scene.mask(name) if self.scene is not None else self.masks(name) if self.masks else None

    def named(self, text: str) -> list[str]:
        """The source's objects that a text names, each once, in order."""
        return list(dict.fromkeys(name for _, name, _ in self.lexicon(text))) if self.lexicon else []

    def name_at(self, text: str, end: int) -> str | None:
        """The object that the noun of a text which ends at a character names (`hydrant` a `fire hydrant`), None if it names none."""
        found = self.lexicon(text) if self.lexicon else []
        return next((name for _, name, span in found if span[1] == end), None)

    @property
    def true(self) -> list[str] | None:
        """What is true of the picture, as CHAIR has it: the objects, and those that people name; None if not known."""
        if self.objects is None:
            return None
        return list(dict.fromkeys((*self.objects, *(name for text in self.captions for name in self.named(text)))))


def load(images: str = "", count: int = 1000, seed: int = 0) -> list[Picture]:
    """At most `count` pictures of a source: "" or `scenes` draws test scenes (from number `seed * count` on), the others come in the order
    of their names or of the release.

    Raises MmnError where there is no such folder, no picture in it, or a file of another form."""
    if count < 1:
        raise MmnError(f"count is a number of pictures, at least 1, not {count}.")
    if images in ("", "scenes"):
        drawn = scenes.sample(count, first=seed * count)
        return [Picture(f"scene-{scene.seed}", scene=scene, objects=scene.names, lexicon=scene_nouns) for scene in drawn]
    kind, folder, part = _parsed(images)
    if kind:
        return (_sbu(folder, part) if kind == "sbu" else _coco(folder, part or "val2017"))[:count]
    return [Picture(readable(path.name), path=path) for path in list_images(folder)[:count]]


def _parsed(images: str) -> tuple[str, Path, str]:
    """Kind (sbu, coco, or "" for a folder of pictures), folder and part of a source that is no drawn one."""
    kind, _, rest = images.partition(":")
    if kind not in ("sbu", "coco") or not rest:
        return "", Path(images).expanduser(), ""
    if os.path.isdir(Path(rest).expanduser()) or ":" not in rest:
        return kind, Path(rest).expanduser(), ""
    folder, _, part = rest.rpartition(":")
    return kind, Path(folder).expanduser(), part


def absolute(images: str) -> str:
    """A source whose folder is given in full, so that it can be found from anywhere. Raises MmnError for an empty one: a variable of the
    shell that is not set must not become drawn scenes."""
    if not images:
        raise MmnError("images must not be empty: name a source of pictures, or scenes for drawn ones.")
    if images == "scenes":
        return images
    kind, folder, part = _parsed(images)
    return f"{kind}{':' * bool(kind)}{folder.resolve()}{':' * bool(part)}{part}"


def undivided(images: str) -> str:
    """A source without its part of the release's split, which changes with every picture that is fetched."""
    kind, folder, _ = _parsed(images)
    return f"sbu:{folder}" if kind == "sbu" else images


def dead(images: str) -> pd.DataFrame:
    """The addresses from which `mmn fetch` got nothing, columns url and reason: empty for a source that is not fetched."""
    kind, folder, _ = _parsed(images)
    rows = _manifest(folder) if kind == "sbu" else pd.DataFrame(columns=["url", "reason", "file"])
    return rows.loc[rows["file"] == "", ["url", "reason"]]


def left_out(images: str) -> str:
    """One sentence on what `load` leaves out of a folder though it looks like pictures, else nothing: see
    `mmn.images.passed_over`."""
    kind, folder, _ = _parsed(images)
    return "" if kind or images in ("", "scenes") else passed_over(folder)


def _manifest(folder: Path) -> pd.DataFrame:
    path = folder / "manifest.csv"
    if not os.path.exists(path):
        raise MmnError(f"{folder} has no manifest.csv: fetch the pictures with `mmn fetch sbu`.")
    try:
        return pd.read_csv(path, keep_default_na=False, usecols=["url", "caption", "file", "reason"], dtype=str)
    except (OSError, ValueError) as error:
        raise MmnError(f"{path} is not what `mmn fetch sbu` writes ({error}): fetch the pictures again.") from None


def _sbu(folder: Path, part: str) -> list[Picture]:
    rows = _manifest(folder)
    rows = rows[rows["file"] != ""].reset_index(drop=True)
    if part:
        parts = split(len(rows))
        if part not in parts:
            raise MmnError(f"The release's split has the parts {', '.join(parts)}, not {part!r}.")
        rows = rows.iloc[parts[part]]
    if rows.empty:
        raise MmnError(f"{folder} has too few pictures{f' for the part {part}' * bool(part)}: fetch more with `mmn fetch sbu`.")
    return [Picture(row.file, folder / "images" / row.file, captions=(row.caption,)) for row in rows.itertuples()]


def _coco(folder: Path, part: str) -> list[Picture]:
    """Pictures of COCO with the names of their objects (the 80 categories) and real masks, by the official tools; their words, see
    mmn.coco."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise MmnError("COCO is read with pycocotools: pip install 'mmn[data]'.") from None
    files = {kind: folder / "annotations" / f"{kind}_{part}.json" for kind in ("instances", "captions")}
    if not os.path.exists(files["instances"]):
        raise MmnError(f"There is no {files['instances']}: give the folder that holds COCO's annotations/ and {part}/.")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its tools talk
            things = COCO(str(files["instances"]))
            said = COCO(str(files["captions"])) if files["captions"].exists() else None
        names = {key: each["name"] for key, each in things.cats.items()}
        table = coco.words(folder / "annotations")
        table |= {name.casefold(): name for name in names.values() if name not in table.values()}  # categories of somebody's own
        lexicon = coco.lexicon(table)
        found = []
        for number in sorted(things.imgs):
            own = things.imgToAnns[number]
            objects = tuple(dict.fromkeys(names[each["category_id"]] for each in own))

            def mask(noun: str, own: list = own) -> np.ndarray | None:
                try:
                    some = [things.annToMask(each).astype(bool) for each in own if names[each["category_id"]] == noun]
                except (KeyError, IndexError, TypeError, ValueError):  # an outline that is none
                    return None
                return np.logical_or.reduce(some)

            written = said.imgToAnns[number] if said else []
            captions = tuple(each["caption"] for each in written if isinstance(each["caption"], str))
            name = things.imgs[number]["file_name"]
            found.append(Picture(name, folder / part / name, objects=objects, captions=captions, masks=mask, lexicon=lexicon))
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise MmnError(f"COCO's annotations {part} in {folder} are damaged ({error!r}): get them again.") from None
    if not any(picture.objects for picture in found):
        raise MmnError(f"{files['instances']} has no annotation of a picture that it lists: get it again.")
    if len({picture.id for picture in found}) < len(found):
        raise MmnError(f"{files['instances']} names a picture twice: get it again.")
    return found
