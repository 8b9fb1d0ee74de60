"""The explorer in JupyterLab and in Notebook 7, driven by a real browser: words are clicked, a slider is dragged, keys are pressed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from browser import barriers, need, start
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

TOKEN = "a-token-for-this-test-alone"
PATIENCE = 180  # seconds that a step may take on a busy machine
CELLS = (
    "import mmn\nfrom mmn.explorer import explore\nvlm = mmn.load('tiny-llava')",
    "explore(vlm, {name: mmn.scenes.draw(seed).image for seed, name in enumerate(['one', 'two'])}, k=5)",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Jupyter server of its own, with a notebook that shows the explorer; it serves both front ends."""
    need("The explorer in a browser")
    home = tmp_path_factory.mktemp("jupyter")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, home / "explorer.ipynb")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))  # which would cover what is clicked
    places = {f"JUPYTER_{what}_DIR": str(home / what.lower()) for what in ("CONFIG", "DATA", "RUNTIME")}
    places |= {
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={home}",
        "--LabApp.expose_app_in_browser=True",
        "--JupyterNotebookApp.expose_app_in_browser=True",
    ]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env={**os.environ, **places}, stdout=log, stderr=log, cwd=home
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for(address + f"api/status?token={TOKEN}", process, home / "log")
            yield address
        finally:
            process.terminate()  # which ends its kernels, too
            process.wait(30)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(4 * PATIENCE):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    need("The explorer in a browser")
    chrome = start(tmp_path_factory.mktemp("chromium"))
    chrome.set_window_size(1280, 1400)
    yield chrome
    chrome.quit()


class Page(NamedTuple):
    """The explorer on a page."""

    driver: webdriver.Chrome

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, f".mmn-explorer {selector}")

    def word(self, text: str) -> WebElement:
        return next(button for button in self.all(".widget-toggle-buttons button") if button.text.strip() == text)

    def state(self) -> tuple[str, str, str]:
        """The figure, the captions and the list of neurons, as the page has them."""
        selectors = "img", ".widget-html del, .widget-html ins", "select[multiple]"
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.src || e.textContent).join(' ')"
        figure, marks, neurons = (self.driver.execute_script(script, f".mmn-explorer {each}") for each in selectors)
        return figure, marks, neurons

    def settled(self, before: tuple[str, str, str]) -> tuple[str, str, str]:
        """The state as soon as it is another than `before` and nothing is at work."""

        def done(_: object) -> bool:
            status = [each.text for each in self.all("[role=status]")]
            return status == ["Ready."] and self.state()[0] != before[0]

        WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[Exception]).until(done)
        return self.state()


@pytest.mark.parametrize("front", ["lab/tree/explorer.ipynb", "notebooks/explorer.ipynb"], ids=["JupyterLab", "Notebook 7"])
def test_words_are_clicked_and_the_slider_is_dragged(server: str, driver: webdriver.Chrome, front: str) -> None:
    page = Page(driver)
    driver.get(f"{server}{front}?token={TOKEN}")
    wait = WebDriverWait(driver, PATIENCE)
    kernel = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
    wait.until(lambda it: it.execute_script(f"return {kernel}?.status === 'idle'"))
    driver.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    state = page.settled(("", "", ""))
    assert page.all("img")[0].get_attribute("alt")

    first = next(button.text for button in page.all(".widget-toggle-buttons button.mod-active"))
    words = [button.text.strip() for button in page.all(".widget-toggle-buttons button")]
    other = words[-1] if first != words[-1] else words[0]
    page.word(other).click()
    clicked = page.settled(state)
    assert clicked[2] != state[2], "another word has other neurons"

    handle = page.all(".noUi-handle")[0]
    assert handle.get_attribute("aria-valuenow") == "1.0"
    ActionChains(driver).drag_and_drop_by_offset(handle, 200, 0).perform()
    dragged = page.settled(clicked)
    assert float(handle.get_attribute("aria-valuenow") or 0) > 1
    assert dragged[2] == clicked[2], "the slider leaves the list as it is"

    # The same by keyboard alone: tab to a word, press it; then to the slider, and move it.
    page.word(first).send_keys(Keys.ENTER)
    pressed = page.settled(dragged)
    assert pressed[2] == state[2]
    handle.send_keys(Keys.HOME)
    page.settled(pressed)
    assert handle.get_attribute("aria-valuenow") == "-1.0"
    # ipywidgets gives the handle of a slider no name; its number, which can be typed too, stands beside its label.
    assert not barriers(driver, ".mmn-explorer", but=".noUi-handle")
