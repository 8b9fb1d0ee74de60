"""Where pictures come from: drawn scenes, a folder. A picture is opened when it is needed, and says what is known to be true of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmn import scenes
from mmn.errors import MmnError
from mmn.images import list_images, open_image


@dataclass(frozen=True)
class Picture:
    """One picture of a source. id: its name there. objects: nouns that are true of it, None if not known."""

    id: str
    path: Path | None = None
    scene: scenes.Scene | None = None
    objects: tuple[str, ...] | None = None

    def open(self) -> Image.Image:
        """The picture as RGB. Raises MmnError for a file that is no whole picture."""
        if self.scene is not None:
            return self.scene.image
        assert self.path is not None
        return open_image(self.path)

    def mask(self, noun: str) -> np.ndarray | None:
        """Where the noun is, bool `[H, W]`; None if that is not known."""
        return self.scene.mask(noun) if self.scene is not None and noun in self.scene.names else None


def load(images: str = "", count: int = 1000, seed: int = 0) -> list[Picture]:
    """At most `count` pictures of a source: "" or `scenes` draws test scenes (from number `seed * count` on), anything else is a folder,
    whose pictures come in the order of their names.

    Raises MmnError where there is no such folder or no picture in it."""
    if count < 1:
        raise MmnError(f"count is a number of pictures, at least 1, not {count}.")
    if images in ("", "scenes"):
        drawn = scenes.sample(count, first=seed * count)
        return [Picture(f"scene-{scene.seed}", scene=scene, objects=scene.names) for scene in drawn]
    return [Picture(path.name, path=path) for path in list_images(images)[:count]]
