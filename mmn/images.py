"""Open pictures safely: every odd kind of file becomes an RGB picture, or one sentence that says why not.

The formats are a short list of plain ones, so that no picture starts another program; a limit on pixels is checked before
anything is unpacked."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmn.errors import MmnError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", *(("AVIF",) if find_spec("PIL._avif") else ()))
UNKNOWN = (".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")  # to Pillow
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
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:  # what Pillow's decoders raise on damaged files
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


def list_images(folder: str | PathLike[str]) -> list[Path]:
    """The picture files of a folder, by name, with any ending that Pillow knows for a format read here; files whose name begins
    with a dot do not count, and sub-folders are not searched. What is passed over, `passed_over` says.

    Raises MmnError if there is no such folder or no picture in it."""
    where = Path(folder)
    try:
        if not where.is_dir():
            raise MmnError(f"There is no folder {where}: give a folder with pictures.")
        files = sorted(path for path in where.iterdir() if _kind(path.name) == "read" and path.is_file())
    except PermissionError:
        raise MmnError(f"The folder {where} may not be read: change its permissions.") from None
    except OSError as error:  # such as a name that is too long
        raise MmnError(f"The folder {where} cannot be read ({error.strerror}): give another one.") from None
    if not files:
        left = passed_over(where)
        raise MmnError(f"The folder {where} holds no pictures ({', '.join(FORMATS)}): {left or 'give another one.'}")
    return files


def passed_over(folder: str | PathLike[str]) -> str:
    """One sentence on what `list_images` leaves out of a folder though it looks like pictures: files of formats that are not
    read here, and sub-folders that hold pictures. Empty where there is nothing of the kind."""
    where, said = Path(folder), []
    with suppress(OSError):
        if files := sorted(path for path in where.iterdir() if _kind(path.name) == "other" and path.is_file()):
            said.append(f"{_few(files)} cannot be read here: convert to JPEG or PNG")
        if deeper := _with_pictures(where):
            said.append(f"sub-folders are not searched, and {_few(deeper)} {'holds' if len(deeper) == 1 else 'hold'} pictures")
    return f"{'; '.join(said)}." if said else ""


def _few(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(readable(path.name) for path in paths[:3]) + more


def _with_pictures(folder: Path) -> list[Path]:
    """The sub-folders of a folder that hold pictures, at any depth; among its first thousand, as a home has very many."""
    found = set()
    for place, folders, files in itertools.islice(os.walk(folder), 1000):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(place) != folder and any(_kind(name) for name in files):
            found.add(folder / Path(place).relative_to(folder).parts[0])
    return sorted(found)


def _kind(name: str) -> str:
    """What a file's name says of it: `read` for a picture that is read here, `other` for another picture, else nothing."""
    suffix = Path(name).suffix.lower()
    kind = _endings().get(suffix, "")
    if name.startswith("."):
        return ""
    if kind in (*FORMATS, "MPO"):  # which begins as a JPEG does, and is read as one
        return "read"
    return "other" if suffix in UNKNOWN or Image.MIME.get(kind, "").startswith("image/") else ""


@cache
def _endings() -> dict[str, str]:
    return Image.registered_extensions()  # reads all of Pillow's formats
