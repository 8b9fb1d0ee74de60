"""Every odd picture is opened as a person would see it, or refused in one sentence."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mmn
from mmn import images
from mmn.images import FORMATS


@pytest.fixture
def save(tmp_path: Path):  # noqa: ANN201
    def write(image: Image.Image, name: str, **options: object) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return write


def refused(path: object) -> str:
    with pytest.raises(mmn.MmnError) as caught:
        mmn.open_image(path)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", ")")), text
    return text


def test_plain(save) -> None:
    image = Image.new("RGB", (5, 3), (10, 20, 30))
    for name in ("a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        opened = mmn.open_image(save(image, name, **options))
        assert opened.mode == "RGB" and opened.size == (5, 3) and opened.getpixel((0, 0)) == (10, 20, 30)
    assert mmn.open_image(str(save(image, "a b ä.png"))).size == (5, 3)


def test_cmyk(save) -> None:
    opened = mmn.open_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "red.jpg"))
    r, g, b = opened.getpixel((4, 4))
    assert opened.mode == "RGB" and r > 200 and g < 60 and b < 60


def test_sixteen_bits(save) -> None:
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    for name in ("deep.png", "deep.tiff"):
        opened = mmn.open_image(save(Image.fromarray(values), name))
        assert [opened.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]
    dark = mmn.open_image(save(Image.fromarray(np.full((4, 4), 200, np.uint16)), "dark.png"))
    assert dark.getpixel((0, 0)) == (1,) * 3, "a dark picture of 16 bits stays dark"


def test_float_and_one_bit(save) -> None:
    assert mmn.open_image(save(Image.fromarray(np.full((3, 3), 0.5, np.float32)), "f.tiff")).getpixel((0, 0)) == (128,) * 3
    assert mmn.open_image(save(Image.fromarray(np.full((3, 3), 200, np.float32)), "g.tiff")).getpixel((0, 0)) == (200,) * 3
    assert mmn.open_image(save(Image.new("1", (3, 3), 1), "bit.png")).getpixel((0, 0)) == (255,) * 3


def test_turned_as_the_camera_says(save) -> None:
    image = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert mmn.open_image(save(image, "turned.jpg", exif=exif)).size == (2, 6)


def test_transparency_on_white(save) -> None:
    assert mmn.open_image(save(Image.new("RGBA", (3, 3), (0, 0, 0, 0)), "clear.png")).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([9, 9, 9])
    assert mmn.open_image(save(palette, "p.png", transparency=0)).getpixel((1, 1)) == (255, 255, 255)
    assert mmn.open_image(save(palette, "q.png")).getpixel((1, 1)) == (9, 9, 9)


def test_first_frame_of_a_gif(save) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    opened = mmn.open_image(save(frames[0], "moving.gif", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 3), (3, 200), (2, 1)])
def test_few_pixels_reach_the_model(save, size) -> None:
    import tiny

    image = mmn.open_image(save(Image.new("RGB", size, "red"), "small.png"))
    trace = tiny.vlm().caption(image, max_new_tokens=1)
    assert mmn.heatmap(tiny.vlm(), trace, [mmn.Neuron(0, 0)]).on_image().shape == size[::-1]


def test_limits_on_pixels(tmp_path: Path) -> None:
    """A header alone, as a decompression bomb has one: refused before anything is unpacked."""

    def bomb(width: int, height: int) -> Path:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        path = tmp_path / f"{width}.png"
        path.write_bytes(data)
        return path

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "10000 x 10000 pixels" in refused(bomb(10_000, 10_000))
        assert "pixels" in refused(bomb(60_000, 60_000))


def test_too_thin(save) -> None:
    """A processor that sets the short side would make gigabytes of it."""
    for size in ((201, 1), (1, 201), (30_000, 100)):
        assert f"has {size[0]} x {size[1]} pixels, too long and thin" in refused(save(Image.new("RGB", size), "thin.png"))
    for size in ((1, 1), (3, 200), (200, 1)):
        assert mmn.open_image(save(Image.new("RGB", size), "fine.png")).size == size


def test_damaged(save, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.gif", "cut.bmp", "cut.tiff", "cut.webp", "cut.avif"):
        path = save(noise, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "cut." in refused(path)
    whole = (path := save(noise, "blank.avif")).read_bytes()
    start = whole.index(b"mdat") + 4
    path.write_bytes(whole[:start] + bytes(len(whole) - start))
    assert "blank.avif is damaged" in refused(path)
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "is no picture" in refused(empty)


def test_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    assert "is no picture" in refused(tmp_path / "text.jpg")
    assert "There is no picture" in refused(tmp_path / "missing.jpg")
    assert "is a folder" in refused(tmp_path)
    assert "is an address" in refused("https://example.org/dog.jpg")
    assert "by the name of its file" in refused(None)
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert "is no picture that can be read" in refused(tmp_path / "a.eps"), "no picture may start Ghostscript"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_a_sentence(data: st.DataObject) -> None:
    """Bytes flipped or cut anywhere: a picture or an MmnError, nothing else."""
    import tempfile

    kind = data.draw(st.sampled_from(FORMATS))
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw[:cut] if data.draw(st.booleans()) else raw)
        file.flush()
        try:
            assert mmn.open_image(file.name).mode == "RGB"
        except mmn.MmnError as error:
            assert len(str(error).splitlines()) == 1


def test_folders(save, tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG".lower(), ".hidden.png"):
        save(Image.new("RGB", (2, 2)), name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert [path.name for path in mmn.list_images(tmp_path)] == ["a.jpg", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(mmn.MmnError, match="holds no pictures"):
        mmn.list_images(tmp_path / "empty")
    with pytest.raises(mmn.MmnError, match="There is no folder"):
        mmn.list_images(tmp_path / "missing")
    with pytest.raises(mmn.MmnError, match="cannot be read .File name too long"):
        mmn.list_images(tmp_path / ("a" * 5000))
    assert "too long" in refused("a" * 5000)


def test_every_ending_of_a_format_that_is_read_here_counts(save, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 3), "red")
    for name, kind in (
        ("phone.JFIF", "JPEG"), ("a.jpe", "JPEG"), ("b.AVIF", "AVIF"), ("c.WebP", "WEBP"), ("d.tif", "TIFF"), ("e.TIFF", "TIFF"),
        ("f.apng", "PNG"), ("g.pbm", "PPM"), ("h.mpo", "JPEG"), ("i.JpEg", "JPEG"),
    ):  # fmt: skip
        save(image, name, format=kind)
    listed = mmn.list_images(tmp_path)
    assert len(listed) == 10 and all(mmn.open_image(path).size == (5, 3) for path in listed)
    assert images.passed_over(tmp_path) == ""


def test_what_looks_like_a_picture_and_is_not_read_is_named(save, tmp_path: Path) -> None:
    save(Image.new("RGB", (5, 3)), "a.png")
    for name in ("notes.txt", "labels.json", "features.h5", "film.mpg", "paper.pdf", ".hidden.heic", "no-ending"):
        (tmp_path / name).touch()
    (tmp_path / "folder.heic").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").touch()
    (tmp_path / ".thumbnails").mkdir()
    save(Image.new("RGB", (5, 3)), ".thumbnails/a.png")
    assert images.passed_over(tmp_path) == ""
    for name in ("IMG_1.HEIC", "b.jp2", "c.psd", "d.svg", "e.NEF"):
        (tmp_path / name).touch()
    assert images.passed_over(tmp_path) == "IMG_1.HEIC, b.jp2, c.psd and 2 more cannot be read here: convert to JPEG or PNG."
    assert [path.name for path in mmn.list_images(tmp_path)] == ["a.png"]
    (tmp_path / "2024" / "deep").mkdir(parents=True)
    save(Image.new("RGB", (5, 3)), "2024/deep/a.JPG", format="JPEG")
    assert images.passed_over(tmp_path).endswith("PNG; sub-folders are not searched, and 2024 holds pictures.")
    (tmp_path / "a.png").unlink()
    with pytest.raises(mmn.MmnError, match="holds no pictures .*: IMG_1.HEIC, .* cannot be read .*, and 2024 holds pictures.$"):
        mmn.list_images(tmp_path)
    assert images.passed_over(tmp_path / "missing") == ""
