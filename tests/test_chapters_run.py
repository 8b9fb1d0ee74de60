"""Every chapter on tiny random models of several families, on drawn scenes and on a folder of pictures: it runs through, or stops with a
sentence that says what the model lacks. `MMN_ALL_CHAPTERS=1 pytest -m slow tests/test_chapters_run.py` runs the full matrix."""

from __future__ import annotations

import json
import os
from pathlib import Path

import drawn_coco
import pandas as pd
import pytest
import real

import mmn
from mmn import chapters, gallery, properties, scenes, sources, stages
from mmn.errors import MmnError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not chapters.FOLDER.exists(), reason="there are no chapters beside the tests"),
]
NAMES = [path.stem for path in sorted(chapters.FOLDER.glob("0[1-8]*.ipynb"))]  # the tour has a test of its own
FAMILIES = ("llava", "gemma3", "instructblip")
SMALL = {"pictures": 4, "concepts": 3, "sample": 3, "live": 1, "top_k": 4}
FULL = [(name, family, source) for name in NAMES for family in FAMILIES for source in ("scenes", "folder")]
# Every chapter, family and source at least once.
FEW = [(name, FAMILIES[n % 3], ("folder", "scenes")[n // 4 % 2]) for n, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures` and one checkpoint a family."""
    root = tmp_path_factory.mktemp("given")
    (root / "pictures").mkdir()
    for number in range(4):
        scenes.draw(number).image.save(root / "pictures" / f"{number}.png")
    (root / "pictures" / "1b.png").write_bytes((root / "pictures" / "1.png").read_bytes()[:300])
    for family in FAMILIES:
        real.save(family, root / family)
    return root


@pytest.mark.parametrize(("name", "family", "source"), FULL if os.environ.get("MMN_ALL_CHAPTERS") else FEW)
def test_it_runs_through_or_says_why_not(name: str, family: str, source: str, folders: Path, tmp_path: Path) -> None:
    path = chapters.chapter(name)
    known = chapters.parameters(path)
    values = {key: value for key, value in SMALL.items() if key in known} | {"model": str(folders / family)}
    if source == "folder" and "images" in known:
        values["images"] = str(folders / "pictures")
    elif source == "folder" and "image" in known:
        values["image"] = str(folders / "pictures" / "0.png")
    try:
        done = chapters.execute(path, values, tmp_path, progress=False)
    except MmnError as stopped:
        assert ": MmnError: " in str(stopped) and str(stopped).endswith("."), stopped
        assert (tmp_path / name / f"{name}.failed.ipynb").exists() and not (tmp_path / name / "settings.json").exists()
    else:
        assert "Traceback" not in done.read_text(encoding="utf-8") and (tmp_path / name / "settings.json").exists()
        assert list((tmp_path / name).glob("*.csv")) and list((tmp_path / name / "figures").iterdir()), "its tables and figures"
        record = json.loads((tmp_path / name / "settings.json").read_text(encoding="utf-8"))
        assert record["settings"].keys() == known.keys() and record["hash"]
        for each in record["tables"]:
            numbers = pd.read_csv(tmp_path / name / f"{each}.csv").select_dtypes("number").columns
            assert set(numbers) <= record["units"][each].keys(), f"{each}.csv: columns without a unit"
        if "images" in values:
            table = pd.read_csv(tmp_path / name / "pictures.csv", keep_default_na=False)
            assert "is damaged" in table.set_index("name")["problem"]["1b.png"] and table["problem"].ne("").sum() == 1


@pytest.mark.parametrize("name", ["03_seeing", "08_hallucination"])
def test_what_coco_knows_of_its_pictures_is_measured(name: str, tmp_path: Path) -> None:
    """On scenes dressed as COCO: heatmaps against the masks of its official tools, CHAIR and POPE against its objects."""
    some = list(scenes.sample(4, first=8 * 10**6 + 500))
    source = drawn_coco.write(tmp_path / "coco", some)
    chapters.execute(chapters.chapter(name), {"images": source, "pictures": 4}, tmp_path, progress=False)
    vlm = mmn.load("tiny-llava")
    if name == "03_seeing":
        rows = pd.read_csv(tmp_path / name / "located.csv", dtype={"picture": str}).query("neurons == 'found'")
        wanted = gallery.ious(vlm, properties.cases(vlm, some), sorted(set(rows["k"])), draws=1).query("neurons == 'found'")
        wanted = wanted.assign(picture=[f"{number:03d}.png" for number in wanted["picture"]])[list(rows)]
    else:
        rows = pd.read_csv(tmp_path / name / "truth.csv", keep_default_na=False)
        wanted = stages.truth(vlm, sources.load(source))
    assert len(rows) > 20
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), wanted.reset_index(drop=True), check_dtype=False, rtol=1e-4)
