"""What the book's pages need beyond Jupyter Book: links to the glossary, docstrings as they are written here, and the address of the
project's repository."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
GLOSSARY = Path(__file__).parent.parent / "glossary.md"
# Linked where a page says so.
AMBIGUOUS = {"closed form", "edit", "gate", "live", "overlap", "position", "removal", "resampling", "step", "vote", "write"}
NO_LINKS = nodes.reference | nodes.literal | nodes.literal_block | nodes.title | nodes.math | nodes.raw | addnodes.pending_xref


@cache
def glossary() -> dict[str, str]:
    """The terms that are linked by themselves: in small letters, and as the glossary has them."""
    found = re.findall(r"^(?!:::|#)(\S.*)\n(?=(?:\S.*\n)*  )", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    return {term.lower(): term for term in found if term not in AMBIGUOUS}


def link_terms(app: Sphinx, doctree: nodes.document) -> None:
    """On each page, the first use of a term of the glossary leads there, in the plural too."""
    page = app.env.docname
    if page.startswith(("book/glossary", "book/api")):
        return
    linked = set()
    some = "|".join(r"\s+".join(map(re.escape, term.split())) for term in sorted(glossary(), key=len, reverse=True))
    for text in list(doctree.findall(lambda each: isinstance(each, nodes.Text | addnodes.pending_xref))):
        if isinstance(text, addnodes.pending_xref):
            linked |= {text["reftarget"].lower()} if text.get("reftype") == "term" else set()
            continue
        above, node = [], text.parent
        while node is not None:
            above.append(node)
            node = node.parent
        if any(isinstance(each, NO_LINKS) for each in above):
            continue
        parts: list[nodes.Node] = []
        end = 0
        for use in re.finditer(rf"(?<![\w-])({some})s?(?![\w-])", text, re.IGNORECASE):
            key = " ".join(use[1].lower().split())
            if key not in linked:
                linked.add(key)
                term = glossary()[key]
                link = addnodes.pending_xref(
                    "", nodes.inline(use[0], use[0], classes=["std-term"]), refdomain="std", reftype="term", reftarget=term,
                    refexplicit=True, refdoc=page, refwarn=True,
                )  # fmt: skip
                parts += [nodes.Text(text[end : use.start()]), link]
                end = use.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in backticks, paragraphs and lists with dashes: all else is shown as it stands."""
    parts = CODE.split("\n".join(line.strip() for line in lines))
    for index, part in enumerate(parts):
        if index % 2:
            code = " ".join(part.strip("`").split())
            parts[index] = f"``{code}``\\ "
        else:
            part = re.sub(r"([\\*|_])", r"\\\1", part)
            parts[index] = re.sub(r"^(\d+)\.", r"\1\\.", part, flags=re.MULTILINE)
    lines[:] = "".join(parts).split("\n")


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, text: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Sphinx cannot link types with lists inside, as of functions, and shows the ~ of `~torch.Tensor`: there, names without modules."""
    if text and "[[" in text:
        text = re.sub(r"~(\w+\.)+", "", text)
    return text, returns


def repository(app: Sphinx, config: Config) -> None:
    """Buttons that open a notebook on Binder or Colab, where the build was told in MMN_REPOSITORY where the project is published; without
    it there are none, rather than dead ones."""
    if url := os.environ.get("MMN_REPOSITORY", "").rstrip("/"):
        config.html_theme_options |= {
            "repository_url": url,
            "repository_branch": os.environ.get("MMN_BRANCH", "main"),
            "path_to_docs": ".",
            "use_repository_button": True,
            "launch_buttons": {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
        }


def accessible(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Lists that are none to a screen reader: docutils' references, whose entries it does not count, and the parameters of a long
    signature, which Sphinx sets as definitions without terms."""
    if "body" in context:
        body = context["body"].replace('<div role="list" class="citation-list">', '<div class="citation-list">')
        context["body"] = re.sub(r"<dl>(?=\s*<dd>)", '<dl role="presentation">', body)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("doctree-read", link_terms)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("config-inited", repository)
    app.connect("html-page-context", accessible)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
