"""Open pictures safely: every odd kind of file becomes an RGB picture, or one sentence that says why not.

The formats are a short list of plain ones, so that no picture starts another program; a limit on pixels is checked before
anything is unpacked."""

from __future__ import annotations

import os
import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmn.errors import MmnError
from mmn.nouns import drawn_world

if TYPE_CHECKING:
    from mmn.vlm import VLM

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
MAX_PIXELS = 64_000_000
THIN = 200  # long side over short; a processor that sets the short side would make gigabytes of a thinner picture


def open_image(path: str | PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file as RGB: turned as its EXIF data says, transparency on white, 16 bits scaled to 8 (65535 is
    white, so that 12 bits in 16 come out dark), a GIF's first frame.

    Raises MmnError where there is no such file, it is no picture, it is damaged, it has more than `max_pixels` pixels, or it is
    too thin for a model."""
    if not isinstance(path, str | PathLike):
        raise MmnError(f"A picture is opened by the name of its file, not by {type(path).__name__}.")
    text = readable(path)
    if not text:
        raise MmnError("The name of the picture's file is empty: give one.")
    if text.startswith(("http://", "https://")):
        raise MmnError(f"{text} is an address, not a file: download the picture and give the file's name.")
    file, name = Path(path), readable(Path(path).name)
    try:
        if file.is_dir():
            raise MmnError(f"{text} is a folder, not a picture: give one file in it, or find its pictures with mmn.list_images.")
        if file.exists() and not file.is_file():
            raise MmnError(f"{text} is no file but a pipe or a device: give a picture's file.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit on pixels is checked here
            with Image.open(file, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    limit = f"{max_pixels / 1e6:g} million"
                    raise MmnError(f"{name} has {width} x {height} pixels, more than the limit of {limit}: make it smaller.")
                if max(width, height) > THIN * min(width, height):
                    raise MmnError(f"{name} has {width} x {height} pixels, too long and thin for any model: crop it.")
                picture.load()
                return to_rgb(picture)
    except MmnError:
        raise
    except FileNotFoundError:
        raise MmnError(f"There is no picture {text}: check the file's name and folder.") from None
    except Image.DecompressionBombError:
        raise MmnError(f"{name} has far more than {max_pixels / 1e6:g} million pixels: make it smaller.") from None
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise MmnError(f"{name} is no picture that can be read here ({kinds}): convert it to one of these.") from None
    except PermissionError:
        raise MmnError(f"{text} may not be read: change its permissions.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise MmnError(f"{name} is damaged or cut short ({error}): get the picture again.") from None


def readable(path: str | PathLike[str]) -> str:
    """A file's name as text that can be written: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB of 8 bits, upright."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(picture).astype(np.float64))
        top = values.max(initial=0)
        if picture.mode.startswith("I;16") or top > 255:
            values = values / 257  # 16 bits: 65535 becomes 255
        elif picture.mode == "F" and top <= 1:
            values = values * 255  # shares of 1
        return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def scenes_only(vlm: VLM) -> str:
    """The sentence for a reader whose own pictures a model of the drawn world is to caption; "" for any other model."""
    if not drawn_world(vlm.model.config):
        return ""
    return (
        f"{vlm.name} knows drawn scenes only, so what it says of a photograph means nothing: for photographs give --model one such as "
        "llava-hf/llava-1.5-7b-hf (the book's page On a real model says what it takes)."
    )


def list_images(folder: str | PathLike[str]) -> list[Path]:
    """The picture files of a folder, by name; files whose name begins with a dot do not count.

    Raises MmnError if there is no such folder or no picture in it."""
    where = Path(folder)
    try:
        if not where.is_dir():
            raise MmnError(f"There is no folder {where}: give a folder with pictures.")
        files = sorted(f for f in where.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())
    except PermissionError:
        raise MmnError(f"The folder {where} may not be read: change its permissions.") from None
    except OSError as error:  # such as a name that is too long
        raise MmnError(f"The folder {where} cannot be read ({error.strerror}): give another one.") from None
    if not files:
        raise MmnError(f"The folder {where} holds no pictures ({', '.join(sorted(SUFFIXES))}): give another one.")
    return files
