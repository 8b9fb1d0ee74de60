"""Drawn scenes as a folder of COCO: the same pictures, objects and masks, in the files of its official tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from mmn.scenes import CONCEPTS, Scene


def write(folder: Path, some: Sequence[Scene]) -> str:
    """`coco:FOLDER`, the source, whose words are those of the scenes' world."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images, annotations = [], []
    for number, scene in enumerate(some):
        name = f"{number:03d}.png"
        scene.image.save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name, "width": scene.image.width, "height": scene.image.height})
        for concept in scene.names:
            code = rle.encode(np.asfortranarray(scene.mask(concept), np.uint8))
            segmentation = {"size": code["size"], "counts": code["counts"].decode()}
            place = {"id": len(annotations) + 1, "image_id": number, "category_id": list(CONCEPTS).index(concept)}
            annotations.append(place | {"segmentation": segmentation, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CONCEPTS)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    words = [f"{each.name}, {each.plural}" for each in CONCEPTS.values()]
    (folder / "annotations" / "synonyms.txt").write_text("\n".join(words))
    return f"coco:{folder}"
