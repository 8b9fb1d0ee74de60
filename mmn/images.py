"""Open pictures that people bring: whatever Pillow reads, turned as the camera meant it, in RGB, within limits, or one clear sentence."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmn.errors import MmnError

MAX_PIXELS = 64_000_000
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file as 8-bit RGB: the first frame of an animation, rotated by its EXIF tag, transparency on white, 16 bits and
    CMYK converted.

    Raises MmnError for a file that is missing, no picture, cut short, smaller than 2 x 2 or larger than 64 megapixels."""
    path = Path(path)
    if not path.is_file():
        raise MmnError(f"There is no picture file at {str(path)!r}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise MmnError(
                        f"{path.name} has {width * height / 1e6:.0f} megapixels; make it smaller than {MAX_PIXELS // 10**6}."
                    )
                if min(width, height) < 2:
                    raise MmnError(f"{path.name} is only {width} x {height} pixels; give a picture of at least 2 x 2.")
                picture.seek(0)
                return _rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as problem:
        raise MmnError(f"{path.name} is no picture that can be read; give a JPEG, PNG, GIF, WebP, BMP or TIFF file.") from problem
    except Image.DecompressionBombError as problem:
        raise MmnError(f"{path.name} has too many pixels; make it smaller than {MAX_PIXELS // 10**6} megapixels.") from problem
    except (OSError, SyntaxError, EOFError) as problem:
        raise MmnError(f"{path.name} is damaged or cut short ({problem}); save it again.") from problem


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits and more: to 8, by the range of the type or of the picture
        values = np.asarray(picture).astype(np.float64)
        top = 65535.0 if picture.mode.startswith("I") and 255 < values.max() <= 65535 else max(values.max(), 1.0)
        picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def list_images(folder: str | Path) -> list[Path]:
    """The picture files of a folder, by name. Raises MmnError for a folder that is missing or holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MmnError(f"There is no folder {str(folder)!r}.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise MmnError(f"The folder {str(folder)!r} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found
