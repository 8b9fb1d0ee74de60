"""`mmn run` and `mmn list`: parameters are checked before a kernel starts; a chapter that stops leaves a sentence."""

import ast
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import tiny
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import mmn
from mmn import chapters, claims, cli, metrics, scenes
from mmn.errors import MmnError

LONG = "a" * 5000


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder of one small chapter."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = new_code_cell(
        'model: str = "tiny-llava"  # a model\nimages: str = ""  # a folder\ntop_k: int = 10  # neurons\nshare: float = 0.5  # of them\n'
        'loud: bool = False  # or not\ndevice: str = ""  # of the weights\ndtype: str = "float32"  # of them\nout: str = ""  # a folder\n'
        "offset = -5  # without a type\nmore: list = []  # of a type that has no text"
    )
    cell.metadata["tags"] = ["parameters"]
    work = new_code_cell(
        "import mmn.errors, os, time\nfrom pathlib import Path\nif top_k > 99:\n    raise mmn.errors.MmnError('top_k is too large.')\n"
        "if share == 2: time.sleep(60)\nif share == 3: os.kill(os.getpid(), 9)\n"
        "from IPython.display import Image\ndisplay(Image(b'\\x89PNG\\r\\n\\x1a\\n...', format='png', width=1, height=1))\n"
        "Path(out, 'table.csv').write_text(f'{top_k},{share},{loud},{images}')"
    )
    work.metadata["mystnb"] = {"image": {"alt": "A cat on the beach, and a dog."}}
    nb = new_notebook(
        cells=[cell, work], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    nbformat.write(nb, folder / "04_small.ipynb")
    monkeypatch.setattr(chapters, "FOLDER", folder)
    return tmp_path


def test_a_chapter_runs_with_other_parameters_and_says_how(book, capsys):
    (book / "pictures").mkdir()
    scenes.draw(1).image.save(book / "pictures" / "1.png")
    words = ["run", "4", "-p", "top_k=3", "-p", "share=0.25", "-p", "loud=true", "--images", str(book / "pictures")]
    assert cli.main([*words, "--out", str(book / "results")]) == 0
    results = book / "results" / "04_small"
    assert (results / "table.csv").read_text() == f"3,0.25,True,{book / 'pictures'}"
    assert sorted(p.name for p in results.iterdir()) == ["04_small.ipynb", "figures", "settings.json", "table.csv"]
    # Numbered as the chapter counts its cells, without the one that papermill adds.
    assert (results / "figures" / "cell-02-a-cat-on-the-beach-and.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((results / "settings.json").read_text())  # a notebook that does not write its own has one, too
    assert record["settings"] == {"model": "tiny-llava", "images": str(book / "pictures"), "top_k": 3, "share": 0.25, "loud": True,
                                  "device": "", "dtype": "float32", "out": str(results), "offset": -5, "more": []}  # fmt: skip
    assert record["versions"]["papermill"] and "commit" in record
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "04_small" in listed and "top_k:" in listed and "neurons" in listed


def by_papermill(path):
    """Name -> type, default and meaning, as papermill finds them."""
    kind = {"None": lambda default: type(ast.literal_eval(default)).__name__}
    return {
        name: (kind.get(each["inferred_type_name"], lambda _, told=each["inferred_type_name"]: told)(each["default"]),
               each["default"], each["help"])
        for name, each in papermill.inspect_notebook(path).items()
    }  # fmt: skip


ODD = """
# what follows is odd
offset = -5  # without a type
shapes: list[int] = [
    1,
    2,
]  # on several lines
told = 3  # type: int the old way
name: "str" = 'é'  # quoted
bare = None
"""


def test_parameters_are_those_that_papermill_finds(book, tmp_path):
    odd = new_code_cell(ODD)
    odd.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1"), odd], metadata=kernel), tmp_path / "odd.ipynb")
    own = sorted((Path(chapters.__file__).parent.parent / "notebooks").glob("*.ipynb"))
    assert len(own) > 9
    for path in [*own, tmp_path / "notebooks" / "04_small.ipynb", tmp_path / "odd.ipynb"]:
        found = {name: tuple(each[key] for key in ("type", "default", "help")) for name, each in chapters.parameters(path).items()}
        assert found == by_papermill(path) and list(found) == list(by_papermill(path)), path
    assert len(found) == 5


def test_parameters_that_are_no_python_are_a_sentence_and_magics_are_passed_over(tmp_path):
    for number, (source, found) in enumerate((("%matplotlib inline\nk = 1", ["k"]), ("k <- 1 +", None))):
        cell = new_code_cell(source)
        cell.metadata["tags"] = ["parameters"]
        path = tmp_path / f"{number}.ipynb"
        nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": {"name": "k", "display_name": "k"}}), path)
        if found:
            assert list(chapters.parameters(path)) == found
        else:
            with pytest.raises(MmnError, match="is no Python"):
                chapters.parameters(path)


def test_listing_imports_nothing_slow():
    code = (
        "import sys, mmn.cli; assert mmn.cli.main(['list']) == 0; "
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib', 'nbformat', 'papermill'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "00_tour" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "9"], "There is no chapter '9'"),
        (["run", "4", "-p", "topk=3"], "has no parameter 'topk': it has model, images, top_k"),
        (["run", "4", "-p", "top_k=many"], "top_k is a value of type int, not 'many'"),
        (["run", "4", "-p", "loud=perhaps"], "loud is a value of type bool"),
        (["run", "4", "-p", "top_k"], "NAME=VALUE"),
        (["run", "4", "--images", "nowhere"], "nowhere"),
        (["run", "4", "--images", "empty"], "empty"),
        (["run", "4", "--images", "sbu:empty"], "has no manifest.csv"),
        (["run", "4", "--model", "nobodys"], "There is no model 'nobodys'"),
        (["run", "4", "--images", "broken.ipynb"], "broken.ipynb is a file: images names a folder"),
        (["run", "4", "-p", "top_k=0"], "top_k is a whole number from 1 to 1,000,000, not 0."),
        (["run", "4", "-p", "top_k=-3"], "top_k is a whole number from 1 to 1,000,000, not -3."),
        (["run", "4", "-p", f"top_k={10**12}"], "top_k is a whole number from 1 to 1,000,000, not 1000000000000."),
        (["run", "4", "-p", "offset=x"], "offset is a value of type int, not 'x'"),
        (["run", "4", "-p", "more=[1]"], "more is a value of type list, which cannot be given here"),
        (["run", "4", "--cell-seconds", "0"], "--cell-seconds is a whole number of at least 1, not 0."),
        (["run", "broken.ipynb"], "is no notebook that can be read"),
        (["run", "list.ipynb"], "is no notebook that can be read"),
        (["run", "nobodys.ipynb"], "nobodys.ipynb does not say which kernel runs it"),
        (["run", "4", "-p", "out=here"], "--out alone"),
        (["run", "4", "-p", "device=gpu"], "The device 'gpu' cannot be used"),
        (["run", "4", "-p", "device=meta:x"], "The device 'meta:x' cannot be used"),
        (["run", "4", "-p", "dtype=int64"], "There is no dtype 'int64': use float32"),
        (["run", "4", "-p", "dtype=float8"], "There is no dtype 'float8': use float32, bfloat16, float16 or auto."),
        (["run", "4", "-p", "dtype=float8_e4m3fn"], "There is no dtype 'float8_e4m3fn': use float32"),
        (["run", "4", "-p", "device=meta"], "The device 'meta' cannot be used"),
        (["run", "4", "--model", ""], "model must not be empty."),
        (["run", "4", "--images", ""], "images must not be empty: name a source of pictures, or scenes"),
        (["run", "4", "-p", "images="], "images must not be empty"),
        (["run", "4", "--model", "a", "-p", "model=b"], "model is given twice: leave one of the two away."),
        (["run", "4", "-p", "top_k=1", "-p", "top_k=2"], "top_k is given twice"),
        (["run", "4", "--model", LONG], "There is no model 'aaa"),
        (["run", "4", "--images", LONG], "cannot be read (File name too long)"),
        (["run", f"{LONG}.ipynb"], "There is no chapter 'aaa"),
        (["run", "bare.ipynb", "-p", "k=1"], "bare has no parameter 'k': it has no cell tagged `parameters`."),
    ],
)
def test_bad_parameters_stop_before_anything_starts(book, capsys, monkeypatch, words, message):
    monkeypatch.chdir(book)
    (book / "empty").mkdir()
    (book / "broken.ipynb").write_text("{")
    (book / "list.ipynb").write_text("[]")
    parameters = new_code_cell("k = 1")
    parameters.metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=[parameters]), book / "nobodys.ipynb")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell("k = 1")], metadata=kernel), book / "bare.ipynb")
    assert cli.main([*words, "--out", str(book / "results")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1  # one sentence
    assert not (book / "results").exists()


@pytest.mark.slow
def test_a_chapter_that_stops_leaves_its_sentence_and_no_whole_notebook(book, capsys):
    words = ["run", "4", "--out", str(book / "results"), "-p"]
    for given, said in (
        (["top_k=100"], "MmnError: top_k is too large."),
        (["share=2", "--cell-seconds", "3"], "a cell took more than 3 seconds; see --cell-seconds."),
        (["share=3"], "its process was killed, perhaps for want of memory: take fewer pictures."),
    ):
        assert cli.main([*words, *given]) == 2
        assert f"04_small stopped: {said}" in capsys.readouterr().err
        assert [p.name for p in (book / "results" / "04_small").iterdir()] == ["04_small.failed.ipynb"]
    assert cli.main([*words, "offset=-7"]) == 0  # and the next run takes that away
    assert "04_small.failed.ipynb" not in [p.name for p in (book / "results" / "04_small").iterdir()]


def test_sigterm_stops_a_chapter_as_ctrl_c_does(book):
    """As `timeout` sends it to the command alone, or a cluster also to the chapter's own process, which was writing."""
    out = book / "results"
    command = [sys.executable, "-m", "mmn.cli", "run", str(book / "notebooks" / "04_small.ipynb"), "-p", "share=2"]
    with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True) as run:
        waited = time.monotonic()
        while not any("running" in part.read_text() for part in out.glob("*/.*.part.ipynb")) and time.monotonic() - waited < 60:
            time.sleep(0.02)
        kernels = psutil.Process(run.pid).children()
        (out / "04_small" / ".table.csv.7.part").write_text("half")
        run.terminate()
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 143 and "mmn run: interrupted; nothing was left half-written." in said
    # One that nobody has waited for, as in a container whose first process does not, is over all the same.
    assert kernels and not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in kernels)
    assert not list(out.iterdir())


def test_a_place_for_results_that_cannot_be_is_told_before_anything_starts(book, capsys, monkeypatch):
    monkeypatch.setattr(chapters, "checked", lambda *_: pytest.fail("too late"))
    (book / "file").write_text("")
    for out, said in (
        (book / "file", "is a file: give a folder for out."),
        (book / LONG, "File name too long): give another one for"),
    ):
        assert cli.main(["run", "4", "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_a_notebook_of_ones_own_may_mean_something_else_by_our_files(book):
    table, folder = book / "pictures.csv", book / "own"
    for text in ("name,size\na,3\n", "", "a\n1,2\n1,2,3\n"):
        table.write_text(text)
        assert chapters._left_out(table) == 0
    folder.mkdir()
    for tables in (3, None, [3, "x"], [["x"]], ["../kept"]):
        (book / "kept.csv").touch()
        (folder / "x.csv").touch()
        (folder / "settings.json").write_text(json.dumps({"tables": tables}))
        chapters._clear(folder, book / "own.ipynb")
        assert (book / "kept.csv").exists() and (folder / "x.csv").exists() == (tables != [3, "x"])


def test_a_full_disk_and_a_second_run_are_a_sentence(book, capsys, monkeypatch):
    def full(*_, **__):
        assert cli.main(words) == 2 and "Another run is at work" in capsys.readouterr().err
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("papermill.execute_notebook", full)
    words = ["run", "4", "--out", str(book / "results")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device): free some space or choose another --out" in said
    assert not (book / "results" / "04_small").exists()


def test_paths_may_begin_at_home_and_have_braces(book, monkeypatch):
    def papermill(path, part, values, **_):  # fills in what stands in braces, as papermill does
        shutil.copy(path.format(), part.format())
        seen.update(values)

    seen: dict = {}
    monkeypatch.setattr("papermill.execute_notebook", papermill)
    monkeypatch.setenv("HOME", str(book))
    (book / "pictures").mkdir()
    scenes.draw(1).image.save(book / "pictures" / "1.png")
    (book / "{1}.ipynb").write_bytes((book / "notebooks" / "04_small.ipynb").read_bytes())
    assert cli.main(["run", str(book / "{1}.ipynb"), "--images", "~/pictures", "-p", "model=~/none", "--out", "~/{r}"]) == 2
    assert cli.main(["run", str(book / "{1}.ipynb"), "--images", "~/pictures", "--out", "~/{r}"]) == 0
    assert seen == {"images": str(book / "pictures"), "out": str(book / "{r}" / "{1}")}
    assert (book / "{r}" / "{1}" / "{1}.ipynb").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"concepts": 2}, "concepts is a whole number from 3"),
        ({"pictures": 2.5}, "pictures is a whole number from 1"),
        ({"sample": "many"}, "sample is a whole number from 1"),
        ({"top_k": True}, "top_k is a whole number from 1"),
        ({"noun": 5}, "noun is text, not 5"),
        ({"target": ""}, "target must not be empty"),
        ({"image": "nowhere.png"}, "There is no picture nowhere.png"),
        ({"image": "."}, "is a folder, not a picture"),
        ({"image": __file__}, "no picture that can be read"),
        ({"clip": "nowhere"}, "There is no model 'nowhere' here: give clip a folder"),
        ({"model": "nowhere"}, "There is no model 'nowhere'"),
        ({"images": "nowhere"}, "There is no folder nowhere"),
        ({"images": "scenes"}, 'Scenes are drawn where images is ""'),
        ({"out": __file__}, "is a file: give a folder for out"),
        ({"out": f"{__file__}/deep/er"}, "is a file: give a folder for out"),
        ({"device": "gpu"}, "The device 'gpu' cannot be used"),
    ],
)
def test_a_chapter_checks_for_itself(given, message, monkeypatch):
    def nobody(*_, **__):
        raise OSError("no such name")

    monkeypatch.setattr("huggingface_hub.model_info", nobody)
    fine = {"model": "tiny-llava", "top_k": 5, "seed": 0, "images": "", "out": ""}
    assert chapters.check(**fine) == fine
    with pytest.raises(MmnError, match=re.escape(message)):
        chapters.check(**fine | given)


def test_the_source_scenes_is_what_a_chapter_draws_itself(book):
    assert chapters.checked(chapters.chapter("4"), {"images": "scenes"}) == {"images": ""}


def test_encoders_may_have_names_without_an_owner(monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: None)
    assert chapters.check(bert="roberta-large")


def test_pictures_that_cannot_be_opened_are_left_out_and_told(tmp_path, capsys):
    for number in range(4):
        scenes.draw(number).image.save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    found, table = chapters.opened(str(tmp_path), 2)  # two that can be opened, not the first two files
    assert len(found) == 2 and list(table["picture"]) == [0, -1, 1] and list(table["name"]) == ["0.png", "1.png", "2.png"]
    said = capsys.readouterr().out
    assert said.startswith("left out: 1.png is damaged") and said.count("\n") == 1
    table.to_csv(tmp_path / "pictures.csv", index=False)
    assert chapters._left_out(tmp_path / "pictures.csv") and not chapters._left_out(tmp_path / "none.csv")
    (tmp_path / "4.heic").touch()
    chapters.opened(str(tmp_path), 1)
    assert capsys.readouterr().out == "left out: 4.heic cannot be read here: convert to JPEG or PNG.\n"
    for number in (0, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(MmnError, match="None of the 4 pictures"):
        chapters.opened(str(tmp_path), 9)


def test_photographs_are_kept_smaller_and_small_pictures_as_they_are(tmp_path, capsys):
    sizes = {"a.png": (2000, 1500), "b.png": (6000, 300), "c.png": (1500, 1000), "d.png": (40, 30)}
    for seed, (name, size) in enumerate(sizes.items()):
        tiny.pictures(1, seed, (40, 30))[0].resize(size).save(tmp_path / name)
    found = dict(zip(sizes, chapters.opened(str(tmp_path), 4)[0], strict=True))
    for name in ("a.png", "b.png"):  # near the bound, and of the same shape
        image, (width, height) = found[name], sizes[name]
        assert 0.99 * 1_500_000 < image.width * image.height <= 1_500_000
        assert image.width / image.height == pytest.approx(width / height, rel=0.01)
        small = mmn.open_image(tmp_path / name).resize((40, 30), Image.Resampling.BOX)
        off = np.abs(np.asarray(image.resize((40, 30), Image.Resampling.BOX), float) - np.asarray(small, float))
        assert off.mean() < 2, "of 255: the same picture"
    for name in ("c.png", "d.png"):
        assert found[name].tobytes() == mmn.open_image(tmp_path / name).tobytes()
    assert capsys.readouterr().out == "2 of 4 pictures were made smaller, to 1.5 million pixels at most\n"


@pytest.mark.slow
def test_a_run_that_left_a_picture_out_ends_with_1_and_the_next_whole_one_with_0(book, capsys):
    (book / "pictures").mkdir()
    scenes.draw(1).image.save(book / "pictures" / "1.png")
    (book / "pictures" / "0.png").write_bytes(b"none")
    cells = ['images: str = ""  # a folder\nout: str = ""  # a folder', "from mmn import chapters\nif images:\n"
             "    files = chapters.opened(images, 5)[1]\n    files.to_csv(f'{out}/pictures.csv')"]  # fmt: skip
    made = nbformat.read(chapters.FOLDER / "04_small.ipynb", 4)
    for cell, source in zip(made.cells, cells, strict=True):
        cell.source = source
    nbformat.write(made, chapters.FOLDER / "05_opens.ipynb")
    words = ["run", "5", "--out", str(book / "results")]
    assert cli.main([*words, "--images", str(book / "pictures")]) == 1
    assert (book / "results" / "05_opens" / "05_opens.ipynb").exists()
    assert "Pictures that could not be opened: 1; see" in capsys.readouterr().out
    assert cli.main(words) == 0  # nothing of the run before is left


def test_tables_say_what_made_them(tmp_path):
    vlm = mmn.load("tiny-llava")
    drops = pd.DataFrame({"drop": [1.5]}, index=pd.Index(["dog"], name="noun"))
    seen = pd.DataFrame({"picture": [1, 0], "iou_random": [0.5, 0.25]}, index=[7, 3])
    files = pd.DataFrame(
        {"picture": [0, -1, -1, 1], "name": ["a.png", "b.png", "e.png", "c.png"], "problem": ["", "damaged", "damaged", ""]}
    )
    tables = {"drops": drops, "seen": seen, "pictures": files, "absent": None, "empty": pd.DataFrame([])}
    chapters.write({"out": str(tmp_path / "new"), "seed": 3}, vlm, tables, noun="dog")
    assert (tmp_path / "new" / "drops.csv").read_text() == "noun,drop\ndog,1.5\n"
    assert (tmp_path / "new" / "seen.csv").read_text() == "picture,iou_random\nc.png,0.5\na.png,0.25\n"
    record = json.loads((tmp_path / "new" / "settings.json").read_text())
    assert record["settings"]["seed"] == 3 and record["hash"] == vlm.hash and record["noun"] == "dog"
    assert record["versions"]["torch"] and {"commit", "revision"} <= record.keys()
    assert record["tables"] == ["drops", "pictures", "seen"] and record["units"]["drops"] == {"drop": "nats, of log p of the noun"}
    assert record["units"]["seen"]["iou_random"].startswith("intersection over union")
    assert record["units"]["seen"]["picture"].startswith("the file's name")


def test_claims_in_a_file_have_their_numbers_in_columns_of_their_own():
    found, control = metrics.Interval(0.9, 0.8, 1.0), metrics.Interval(0.1, 0.0, 0.2)
    others = {"seed-1": claims.Contrast(0.6, 0.1), "seed-2": claims.Contrast(0.8, 0.3), "shipped": claims.Contrast(0.7)}
    row = claims.Claim("It holds", "share", found, control, 0.5, contrasts=others)
    table = claims.tidy([row, claims.Claim("It stands alone", "share", found)])
    assert table.loc[0, ["value", "low", "high", "control_value", "bar"]].tolist() == [0.9, 0.8, 1.0, 0.1, 0.5]
    assert table.loc[0, ["seed_mean", "seed_least", "seed_most"]].tolist() == pytest.approx([0.7, 0.6, 0.8])
    assert table.loc[0, ["seed_control", "shipped"]].tolist() == pytest.approx([0.2, 0.7])
    assert table["shipped_control"].dtype == float, "a column of its own numbers has a unit"
    assert table["verdict"].tolist() == ["holds", "holds"] and table.loc[1].isna().sum() >= 4


def test_without_the_checkout_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "FOLDER", tmp_path)
    with pytest.raises(MmnError, match="not part of an installed package"):
        chapters.chapters()


def test_every_chapter_is_listed_with_types_and_meanings():
    for path in chapters.chapters().values():
        for name, each in chapters.parameters(path).items():
            assert each["type"] in ("str", "int", "float", "bool") and each["help"], f"{path.stem}, {name}"
