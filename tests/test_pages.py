"""The book's pages that are no chapters: nothing public is missing, nothing is said that the project's files contradict."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document
from sphinx import addnodes

import mmn

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"


def listed() -> list[str]:
    """The pages of the table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    pages = [page for part in toc["parts"] for page in part["chapters"]]
    below = [page for above in pages for page in above.get("sections", [])]
    return [toc["root"], *(page["file"] for page in pages + below)]


def read(name: str) -> str:
    return (BOOK / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def extension() -> Any:
    spec = importlib.util.spec_from_file_location("mmn_pages", BOOK / "ext" / "mmn_pages.py")
    assert spec and spec.loader
    module = sys.modules.setdefault("mmn_pages", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_every_page_and_chapter_is_in_the_table_of_contents() -> None:
    chapters = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    pages = {f"book/{path.stem}" for path in BOOK.glob("[!_]*.md")}
    assert chapters | pages <= set(listed())


def test_the_first_page_leads_to_every_chapter() -> None:
    text = read("intro.md") + read("_map.html")
    for page in listed():
        if page.startswith("notebooks/0"):
            assert f"/{page}>`" in text, f"intro.md's table of chapters lacks {page}"
    for target in re.findall(r'href="\.\./([\w/]+)\.html', read("_map.html")):
        assert target in listed()


def test_the_reference_has_everything_that_import_brings() -> None:
    text = read("api.md")
    documented = re.findall(r"^\.\. auto\w+:: mmn\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(mmn.__all__)


def test_modules_of_the_reference_exist_and_say_what_they_are() -> None:
    pages = [read(page.name) for page in sorted(BOOK.glob("api_*.md"))]
    documented = re.findall(r"^\.\. automodule:: (mmn\.\w+)$", "\n".join(pages), re.MULTILINE)
    for name in documented:
        module = importlib.import_module(name)
        assert (module.__doc__ or "").strip()
    overview = re.findall(r"^   (mmn\.\w+)$", read("api_modules.md"), re.MULTILINE)
    assert sorted(overview) == sorted(documented), "each module has its place, and the overview names it"


def test_docstrings_become_what_sphinx_reads(extension: Any) -> None:
    lines = ["The `k` best of *all*, `[a,", "    b]`.", "", "1. first", "- x_ | y"]
    extension.docstring(None, "function", "f", None, None, lines)
    assert lines == [r"The ``k``\  best of \*all\*, ``[a, b]``\ .", "", r"1\. first", r"- x\_ \| y"]
    given = "(f: ~collections.abc.Callable[[~mmn.vlm.VLM], ~torch.Tensor])"
    assert extension.signature(None, "", "", None, None, given, None)[0] == "(f: Callable[[VLM], Tensor])"


def test_first_uses_of_terms_lead_to_the_glossary(extension: Any) -> None:
    page = new_document("page")
    words = "A same-layer random neuron, image\ntokens, a neuron, Neurons; FFNs write; a token-like logit lens, logits, `logit`."
    page += [nodes.title("", "The heatmap"), nodes.paragraph("", words.partition("`")[0]), nodes.literal("", "heatmap")]
    page += nodes.emphasis("", "nats")
    page += [
        addnodes.pending_xref("", nodes.Text("patch"), reftype="term", reftarget="patch"),
        nodes.paragraph("", "patches, a patch"),
    ]
    extension.link_terms(SimpleNamespace(env=SimpleNamespace(docname="book/limits")), page)
    links = [(each.astext(), each["reftarget"]) for each in page.findall(addnodes.pending_xref)]
    assert links == [
        ("neuron", "neuron"),
        ("image\ntokens", "image token"),
        ("FFNs", "FFN"),
        ("logit lens", "logit lens"),
        ("logits", "logit"),
        ("nats", "nat"),
        ("patch", "patch"),  # the page's own, no second one
    ]
    assert page.children[1].astext() == words.partition("`")[0]


def test_terms_share_an_explanation_and_words_of_every_day_are_no_links(extension: Any) -> None:
    assert {"contribution", "direct score", "development nouns", "held-out nouns"} <= set(extension.glossary())
    page = new_document("page")
    page += nodes.paragraph("", "Where do they live, step by step? A direct score tells.")
    extension.link_terms(SimpleNamespace(env=SimpleNamespace(docname="book/limits")), page)
    assert [each.astext() for each in page.findall(addnodes.pending_xref)] == ["direct score"]


def test_buttons_lead_to_the_repository_if_there_is_one(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(html_theme_options={"show_toc_level": 2})
    monkeypatch.delenv("MMN_REPOSITORY", raising=False)
    extension.repository(None, config)
    assert config.html_theme_options == {"show_toc_level": 2}
    monkeypatch.setenv("MMN_REPOSITORY", "https://example.org/someone/mmn/")
    extension.repository(None, config)
    assert config.html_theme_options["repository_url"] == "https://example.org/someone/mmn"
    assert set(config.html_theme_options["launch_buttons"]) == {"binderhub_url", "colab_url"}


def test_commands_by_hand_are_those_of_make() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    groups = re.search(r"-c constraints\.txt -e '(\.\[[\w,]+\])'", make)
    assert groups
    page = read("machines.md")
    assert f"pip install -c constraints.txt -e '{groups[1]}'" in page and f'pip install -c constraints.txt -e "{groups[1]}"' in page
    build = re.search(r"jupyter-book (build .+? --path-output book)", make)
    assert build and f"jupyter-book {build[1]}" in page
    assert page.count("not yet run") >= 5


def test_commands_of_the_pages_exist() -> None:
    """Every `mmn NAME` and its --options that a page shows are known to the command line."""
    from mmn.cli import COMMANDS, _parser

    pages = [*BOOK.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    shown = re.findall(
        r"(?:^|/|`)mmn ([a-z]+)\b([^\n`#]*)",
        "\n".join(page.read_text(encoding="utf-8") for page in pages if page.exists()),
        re.MULTILINE,
    )
    assert len(shown) > 10
    for name, rest in shown:
        assert name in COMMANDS, f"mmn {name} {rest}"
        help_text = _help(_parser(name), name)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in help_text, f"mmn {name} knows no {option}"


def _help(parser: Any, name: str) -> str:
    """The help of a command and of the commands under it."""
    command = parser._subparsers._group_actions[0].choices[name]
    below = command._subparsers._group_actions[0].choices.values() if command._subparsers else []
    return "\n".join(each.format_help() for each in (command, *below))


def test_pictures_of_pages_have_an_alternative_text() -> None:
    for page in BOOK.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for alt in re.findall(r"!\[([^\]]*)\]\(", text):
            assert len(alt) > 20, page.name
        assert text.count("```{image}") + text.count("```{figure}") == text.count(":alt:"), page.name
    assert re.search(r'<svg[^>]*aria-label="[^"]{20,}"', read("_map.html"))
