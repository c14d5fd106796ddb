# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of the page in a Chromium of this machine."""

import importlib.util
import shutil

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
MISSING = (
    "needs Chromium on the PATH"
    if not CHROMIUM
    else "needs the package playwright"
    if importlib.util.find_spec("playwright") is None
    else ""
)
LONGEST = 30_000  # ms


@pytest.fixture(scope="module")
def browser():
    if MISSING:
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that somebody has open, what its console says, and what it asked for."""

    def __init__(self, browser, url, **options):
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(LONGEST)
        self.console, self.bodies = [], []
        self.page.on(
            "console", lambda m: m.type in ("error", "warning") and self.console.append(m.text)
        )
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", self.note)
        self.page.goto(url)
        if "key" not in options:
            self.page.locator("input[type=range], #key-text:focus").first.wait_for()

    def note(self, request):
        if request.url.endswith("generations"):  # forms are none of JSON
            self.bodies.append(request.post_data_json)

    def image(self):
        return self.page.get_attribute("#image", "src")

    def status(self, text):
        self.page.locator("#status", has_text=text).wait_for()

    def drawn(self):
        """Wait for the image and those around it."""
        self.status("Drawn in")
        self.page.locator(".tile:disabled").first.wait_for(state="detached")
        return self.image()

    def sideways(self):
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def visit(browser):
    visits = []

    def open_page(url, **options):
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield open_page
    for one in visits:
        one.page.close()
