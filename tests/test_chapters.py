"""`mmn run` and `mmn list`: parameters are checked before a kernel starts; a chapter that stops leaves a sentence."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mmn import chapters, cli
from mmn.errors import MmnError


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder of one small chapter."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = new_code_cell(
        'model: str = "m"  # a model\nimages: str = ""  # a folder\ntop_k: int = 10  # neurons\nshare: float = 0.5  # of them\n'
        'loud: bool = False  # or not\ndevice: str = ""  # of the weights\ndtype: str = "float32"  # of them\nout: str = ""  # a folder'
    )
    cell.metadata["tags"] = ["parameters"]
    work = new_code_cell(
        "import mmn.errors\nfrom pathlib import Path\nif top_k < 1:\n    raise mmn.errors.MmnError('top_k is too small.')\n"
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
    words = ["run", "4", "-p", "top_k=3", "-p", "share=0.25", "-p", "loud=true", "--images", str(book / "pictures")]
    assert cli.main([*words, "--out", str(book / "results")]) == 0
    assert (book / "results" / "table.csv").read_text() == f"3,0.25,True,{book / 'pictures'}"
    record = json.loads((book / "results" / "run.json").read_text())
    assert record["parameters"]["top_k"] == 3 and record["chapter"] == "04_small" and record["versions"]["papermill"]
    assert sorted(p.name for p in (book / "results").iterdir()) == ["04_small.ipynb", "run.json", "table.csv"]
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
        (["run", "4", "--images", "nowhere"], "There is no file or folder nowhere"),
        (["run", "4", "-p", "out=here"], "--out alone"),
        (["run", "4", "-p", "device=gpu"], "The device 'gpu' cannot be used: "),
        (["run", "4", "-p", "device=meta:x"], "The device 'meta:x' cannot be used: "),
        (["run", "4", "-p", "dtype=float8"], "There is no dtype 'float8': use float32, bfloat16, float16 or auto."),
    ],
)
def test_bad_parameters_stop_before_anything_starts(book, capsys, words, message):
    assert cli.main([*words, "--out", str(book / "results")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1  # one sentence
    assert not (book / "results").exists()


def test_a_chapter_that_stops_leaves_its_sentence_and_no_whole_notebook(book, capsys):
    assert cli.main(["run", "4", "-p", "top_k=0", "--out", str(book / "results")]) == 2
    assert "04_small stopped: MmnError: top_k is too small." in capsys.readouterr().err
    assert [p.name for p in (book / "results").iterdir()] == ["04_small.failed.ipynb"]


def test_without_the_checkout_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "FOLDER", tmp_path)
    with pytest.raises(MmnError, match="not part of an installed package"):
        chapters.chapters()


def test_every_chapter_is_listed_with_types_and_meanings():
    for path in chapters.chapters().values():
        for name, each in chapters.parameters(path).items():
            assert each["type"] in ("str", "int", "float", "bool") and each["help"], f"{path.stem}, {name}"
