"""The built book in a real browser: every page, on a desk and on a phone. `make book` builds it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
HTML = ROOT / "book" / "_build" / "html"
PAGES = sorted(str(page.relative_to(HTML)) for page in HTML.rglob("*.html") if "_static" not in page.parts)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
REQUIRED = bool(os.environ.get("MMN_REQUIRE_BROWSER"))


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
    if not (PAGES and CHROMIUM and DRIVER):
        lack = "the book is not built: make book" if CHROMIUM and DRIVER else "chromium and chromedriver are not installed"
        if REQUIRED:
            pytest.fail(f"The pages cannot be tested; {lack}.")
        pytest.skip(f"The pages are not tested here; {lack}.")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def open_page(browser: webdriver.Chrome, address: str) -> None:
    """Open a page and wait until its formulas are drawn."""
    browser.get(address)
    ready = "return document.readyState === 'complete' && (!window.MathJax || !!MathJax.startup.document)"
    WebDriverWait(browser, 60).until(lambda it: it.execute_script(ready))
    if browser.execute_script("return !!window.MathJax"):
        browser.execute_async_script("const done = arguments[0]; MathJax.startup.promise.then(() => done())")


def test_the_book_is_whole(browser: webdriver.Chrome) -> None:
    assert {"index.html", "book/intro.html", "notebooks/00_tour.html", "book/glossary.html"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES or ["index.html"])
def test_page(browser: webdriver.Chrome, site: str, page: str) -> None:
    browser.set_window_size(1280, 900)
    browser.get_log("browser")  # forget earlier pages
    open_page(browser, site + page)
    # What the theme merely remarks on the console, as on a first visit, is no error.
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and e["source"] != "console-api"]
    errors = [e for e in errors if "favicon" not in e["message"]]
    assert not errors, "script errors, or something that is asked for and not there"
    images = browser.execute_script(
        "return [...document.images].map(i => { i.loading = 'eager'; return [i.src, i.alt, i.complete && i.naturalWidth > 0]; })"
    )
    for source, alternative, there in images:
        assert there, f"missing picture {source}"
        assert alternative, f"no alternative text: {source}"
    # A driver cannot make the window narrower than about 500 pixels; the device's size can be set.
    phone = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_page(browser, site + page)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 380, f"{page} scrolls sideways on a phone: {wide} pixels wide"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_formula_failed(browser: webdriver.Chrome, site: str) -> None:
    open_page(browser, site + "notebooks/00_tour.html")
    assert browser.execute_script("return document.querySelectorAll('mjx-container svg').length") >= 10
    assert not browser.execute_script("return document.querySelectorAll('[data-mjx-error], mjx-merror').length")


def test_no_link_inside_the_book_is_broken(browser: webdriver.Chrome, site: str) -> None:
    targets: dict[str, set[str]] = {}
    links: set[tuple[str, str]] = set()
    for page in PAGES:
        open_page(browser, site + page)
        targets[site + page] = set(browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)"))
        hrefs = browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))")
        links |= {(page, urljoin(browser.current_url, href)) for href in hrefs if not href.startswith(("javascript:", "mailto:"))}
    for page, link in sorted(links):
        address, anchor = urldefrag(link)
        if not address.startswith(site):
            continue
        file = HTML / address.removeprefix(site)
        assert file.exists(), f"{page} links to {link}, which is not there"
        if anchor and address in targets:
            assert anchor in targets[address], f"{page} links to {link}, whose place is not on that page"
