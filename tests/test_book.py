"""The built book in a real browser: every page, on a desk and on a phone. `make book` builds it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import barriers, need, start
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
HTML = ROOT / "book" / "_build" / "html"
PAGES = sorted(str(page.relative_to(HTML)) for page in HTML.rglob("*.html") if "_static" not in page.parts)


class Quiet(SimpleHTTPRequestHandler):
    """A file server that keeps its requests to itself."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the built book, served on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless chromium that reaches nothing outside of this machine."""
    need("The book", "" if PAGES else "it is not built: make book")
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def open_page(browser: webdriver.Chrome, address: str) -> None:
    """Open a page and wait until its formulas are drawn."""
    browser.get(address)
    ready = "return document.readyState === 'complete' && (!window.MathJax || !!MathJax.startup.document)"
    WebDriverWait(browser, 60, poll_frequency=0.1).until(lambda it: it.execute_script(ready))
    if browser.execute_script("return !!window.MathJax"):
        browser.execute_async_script("const done = arguments[0]; MathJax.startup.promise.then(() => done())")


# Each page is a group of its own, so that all workers have pages to look at: `make test` says --dist loadgroup.
@pytest.fixture(
    scope="module", params=[pytest.param(page, marks=pytest.mark.xdist_group(page)) for page in PAGES or ["index.html"]]
)
def page(request: pytest.FixtureRequest, browser: webdriver.Chrome, site: str) -> str:
    """A page by its name, loaded once, on a desk, for all tests of it."""
    browser.set_window_size(1280, 900)
    browser.get_log("browser")  # forget earlier pages
    open_page(browser, site + request.param)
    return request.param


def test_the_book_is_whole(browser: webdriver.Chrome) -> None:
    assert {"index.html", "book/intro.html", "notebooks/00_tour.html", "book/glossary.html"} <= set(PAGES)


def test_nothing_is_missing_or_left_unrendered(browser: webdriver.Chrome, page: str) -> None:
    # What the theme merely remarks on the console, as on a first visit, is no error.
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and e["source"] != "console-api"]
    errors = [e for e in errors if "favicon" not in e["message"]]
    assert not errors, "script errors, or something that is asked for and not there"
    raw = browser.execute_script(
        "return [...document.querySelectorAll('main p, main li, main td')].map(e => e.textContent)"
        ".filter(t => /^\\s*\\| .*\\|/.test(t) || /\\{(doc|term|cite|ref)\\}/.test(t))"
    )
    assert not raw, f"Markdown that was not rendered: {raw[:2]}"
    images = browser.execute_script(
        "return [...document.images].map(i => { i.loading = 'eager'; return [i.src, i.alt, i.complete && i.naturalWidth > 0]; })"
    )
    for source, alternative, there in images:
        assert there, f"missing picture {source}"
        assert alternative, f"no alternative text: {source}"


def test_no_page_scrolls_sideways_on_a_phone(browser: webdriver.Chrome, page: str) -> None:
    # A driver cannot make the window narrower than about 500 pixels; the device's size can be set.
    phone = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        drawn = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(innerWidth)))"
        WebDriverWait(browser, 60, poll_frequency=0.1).until(lambda it: it.execute_async_script(drawn) <= 500)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 380, f"{page} scrolls sideways on a phone: {wide} pixels wide"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# axe takes some milliseconds to find a word's contrast, and a page has thousands of words in a few dozen looks. A look is a
# colour, a size and a weight on a ground, which is whatever paints or has left the flow among the elements around the word.
# axe is given the first, the middle and the last word of each look.
SAMPLE = """
const grounds = new Map([[null, '']]);
const ground = element => {
  if (!grounds.has(element)) {
    const {backgroundColor, backgroundImage, opacity, filter, position} = getComputedStyle(element);
    const own = [backgroundColor, backgroundImage, opacity, filter, position].join();
    const plain = own === 'rgba(0, 0, 0, 0),none,1,none,static';
    grounds.set(element, ground(element.parentElement) + (plain ? '' : `>${element.className},${own}`));
  }
  return grounds.get(element);
};
const looks = {};
for (const element of document.body.querySelectorAll('*')) {
  // What is one letter long has no contrast for axe.
  const words = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim().length > 1);
  if (!(words || element.matches('input, select, textarea')) || !element.checkVisibility({visibilityProperty: true})) continue;
  const {color, fontSize, fontWeight, textShadow} = getComputedStyle(element);
  (looks[[color, fontSize, fontWeight, textShadow, ground(element)].join()] ??= []).push(element);
}
for (const alike of Object.values(looks))
  for (const place of [0, alike.length >> 1, alike.length - 1]) alike[place].dataset.sample = '';
"""
# What is left of code are words without a link or a name: axe reads them as one text as well.
PLAIN = """
for (const word of document.querySelectorAll('.highlight pre span, .sig span, .sig em'))
  if (!word.matches('[data-sample], [id]') && !word.querySelector('[data-sample], [id], a')) word.replaceWith(word.textContent);
document.querySelectorAll('.highlight pre, .sig').forEach(code => code.normalize());
"""


def test_no_reader_is_shut_out(browser: webdriver.Chrome, page: str) -> None:
    rule = "*, ::before, ::after { transition: none !important; animation: none !important }"
    still = f"const style = document.createElement('style'); style.textContent = '{rule}';"
    browser.execute_script(
        f"{still} document.head.append(style)"
    )  # what is fading in, or on its way to another colour, has no contrast
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; })")  # solutions too
    themes = {"dark": ("color-contrast",), "light": ()}
    for theme in themes:
        browser.execute_script("document.documentElement.dataset.theme = arguments[0];" + SAMPLE, theme)
    browser.execute_script(PLAIN)
    for theme, rules in themes.items():
        browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        assert not barriers(browser, rules=rules, contrast="[data-sample]"), theme


def test_no_formula_failed(browser: webdriver.Chrome, site: str) -> None:
    open_page(browser, site + "notebooks/00_tour.html")
    assert browser.execute_script("return document.querySelectorAll('mjx-container svg').length") >= 10
    assert not browser.execute_script("return document.querySelectorAll('[data-mjx-error], mjx-merror').length")


class Links(HTMLParser):
    """The places that a page offers and the addresses that it links to."""

    def __init__(self, page: str):
        super().__init__()
        self.ids: set[str] = set()
        self.hrefs: set[str] = set()
        self.feed((HTML / page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element of the page."""
        values = dict(attrs)
        self.ids |= {values["id"] or ""} if "id" in values else set()
        self.hrefs |= {values["href"] or ""} if tag == "a" and "href" in values else set()


def test_no_link_inside_the_book_is_broken() -> None:
    pages = {page: Links(page) for page in PAGES}
    for page, links in pages.items():
        for href in sorted(links.hrefs):
            address = urlsplit(urljoin(page, href))
            if address.scheme or address.netloc:
                continue
            target = unquote(address.path)
            assert (HTML / target).is_file(), f"{page} links to {href}, which is not there"
            if address.fragment and target in pages:
                there = unquote(address.fragment) in pages[target].ids
                assert there, f"{page} links to {href}, whose place is not on that page"
