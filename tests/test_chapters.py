"""`mmn run` and `mmn list`: parameters are checked before a kernel starts; a chapter that stops leaves a sentence."""

import json

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import mmn
from mmn import chapters, cli, scenes
from mmn.errors import MmnError


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder of one small chapter."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = new_code_cell(
        'model: str = "tiny-llava"  # a model\nimages: str = ""  # a folder\ntop_k: int = 10  # neurons\nshare: float = 0.5  # of them\n'
        'loud: bool = False  # or not\ndevice: str = ""  # of the weights\ndtype: str = "float32"  # of them\nout: str = ""  # a folder'
    )
    cell.metadata["tags"] = ["parameters"]
    work = new_code_cell(
        "import mmn.errors, os, time\nfrom pathlib import Path\nif top_k > 99:\n    raise mmn.errors.MmnError('top_k is too large.')\n"
        "if share == 2: time.sleep(60)\nif share == 3: os.kill(os.getpid(), 9)\n"
        "from IPython.display import Image\ndisplay(Image(b'\\x89PNG\\r\\n\\x1a\\n...', format='png', width=1, height=1))\n"
        "Path(out, 'table.csv').write_text(f'{top_k},{share},{loud},{images}')"
    )
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
    assert sorted(p.name for p in results.iterdir()) == ["04_small.ipynb", "figures", "table.csv"]
    assert (results / "figures" / "cell-02.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "04_small" in listed and "top_k:" in listed and "neurons" in listed


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
        (["run", "4", "-p", "top_k=0"], "top_k is a whole number of at least 1, not 0."),
        (["run", "4", "-p", "top_k=-3"], "top_k is a whole number of at least 1, not -3."),
        (["run", "broken.ipynb"], "is no notebook that can be read"),
        (["run", "4", "-p", "out=here"], "--out alone"),
        (["run", "4", "-p", "device=gpu"], "The device 'gpu' cannot be used: "),
        (["run", "4", "-p", "device=meta:x"], "The device 'meta:x' cannot be used: "),
        (["run", "4", "-p", "dtype=float8"], "There is no dtype 'float8': use float32, bfloat16, float16 or auto."),
    ],
)
def test_bad_parameters_stop_before_anything_starts(book, capsys, monkeypatch, words, message):
    monkeypatch.chdir(book)
    (book / "empty").mkdir()
    (book / "broken.ipynb").write_text("{")
    assert cli.main([*words, "--out", str(book / "results")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1  # one sentence
    assert not (book / "results").exists()


def test_a_chapter_that_stops_leaves_its_sentence_and_no_whole_notebook(book, capsys):
    words = ["run", "4", "--out", str(book / "results"), "--cell-seconds", "5", "-p"]
    for given, said in (
        ("top_k=100", "MmnError: top_k is too large."),
        ("share=2", "a cell took more than 5 seconds; see --cell-seconds."),
        ("share=3", "its process was killed, perhaps for want of memory: take fewer pictures."),
    ):
        assert cli.main([*words, given]) == 2
        assert f"04_small stopped: {said}" in capsys.readouterr().err
        assert [p.name for p in (book / "results" / "04_small").iterdir()] == ["04_small.failed.ipynb"]
    (book / "file").write_text("")
    assert cli.main(["run", "4", "--out", str(book / "file")]) == 2 and "cannot be written" in capsys.readouterr().err


def test_a_chapter_checks_for_itself():
    assert chapters.check(model="tiny-llava", top_k=5, seed=0, images="", out="")["top_k"] == 5
    for given in ({"seed": -1}, {"concepts": 1}, {"pictures": 2.5}, {"top_k": True}, {"image": "nowhere.png"}, {"clip": "nowhere"},
                  {"images": "nowhere"}, {"out": __file__}, {"device": "gpu"}):  # fmt: skip
        with pytest.raises(MmnError):
            chapters.check(**given)


def test_pictures_that_cannot_be_opened_are_left_out_and_told(tmp_path, capsys):
    for number in range(3):
        scenes.draw(number).image.save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    found, table = chapters.opened(str(tmp_path), 9)
    assert len(found) == 2 and list(table["picture"]) == [0, -1, 1] and list(table["name"]) == ["0.png", "1.png", "2.png"]
    assert capsys.readouterr().out.startswith("left out: 1.png is damaged")
    table.to_csv(tmp_path / "pictures.csv", index=False)
    assert chapters._left_out(tmp_path / "pictures.csv") and not chapters._left_out(tmp_path / "none.csv")
    for number in (0, 2):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(MmnError, match="None of the 3 pictures"):
        chapters.opened(str(tmp_path), 9)


def test_tables_say_what_made_them(tmp_path):
    vlm = mmn.load("tiny-llava")
    frame = pd.DataFrame({"drop": [1.5]}, index=pd.Index(["dog"], name="noun"))
    chapters.write({"out": str(tmp_path / "new"), "seed": 3}, vlm, {"drops": frame, "absent": None}, noun="dog")
    assert (tmp_path / "new" / "drops.csv").read_text() == "noun,drop\ndog,1.5\n"
    record = json.loads((tmp_path / "new" / "settings.json").read_text())
    assert (
        record["settings"]["seed"] == 3 and record["hash"] == vlm.hash and record["noun"] == "dog" and record["versions"]["torch"]
    )
    assert record["units"] == {"drop": "nats, of log p of the noun"} and record["tables"] == ["drops"]


def test_without_the_checkout_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "FOLDER", tmp_path)
    with pytest.raises(MmnError, match="not part of an installed package"):
        chapters.chapters()


def test_every_chapter_is_listed_with_types_and_meanings():
    for path in chapters.chapters().values():
        for name, each in chapters.parameters(path).items():
            assert each["type"] in ("str", "int", "float", "bool") and each["help"], f"{path.stem}, {name}"
