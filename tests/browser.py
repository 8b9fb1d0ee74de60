"""A headless chromium to test with, for the files that need one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium_axe_python import Axe

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def need(what: str, lack: str = "") -> None:
    """Skip with a sentence where something is lacking, chromium if nothing else; fail where MMN_REQUIRE_BROWSER is set."""
    if not (CHROMIUM and DRIVER):
        lack = "chromium and chromedriver are not installed"
    if lack and os.environ.get("MMN_REQUIRE_BROWSER"):
        pytest.fail(f"{what} cannot be tested; {lack}.")
    if lack:
        pytest.skip(f"{what} is not tested here; {lack}.")


def start(profile: Path) -> webdriver.Chrome:
    """Headless chromium that reaches nothing outside of this machine; `profile` is an empty folder for its files."""
    assert CHROMIUM and DRIVER
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
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
    driver.set_script_timeout(120)
    return driver


def barriers(
    driver: webdriver.Chrome, inside: str = "html", but: str = "", rules: Sequence[str] = (), contrast: str = "*"
) -> list[str]:
    """What axe-core calls a serious or critical barrier in a part of the page: its rule, its reason, and where.

    inside, but: CSS selectors of what to look at, and of what in it to leave out. rules: the only ones to look for. contrast: CSS
    selector of the elements whose contrast is measured, which is slow."""
    axe = Axe(driver)
    axe.inject()
    driver.execute_script("axe.configure({rules: [{id: 'color-contrast', selector: arguments[0]}]})", contrast)
    part = {"include": [[inside]], "exclude": [[but]] if but else []}
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    found = axe.run(json.dumps(part), options)["violations"]
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {node['target']} {node['html'][:160]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
