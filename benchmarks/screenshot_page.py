# SPDX-License-Identifier: Apache-2.0
"""Take a screenshot of the web page of a running `msdda-fast serve`; needs Chromium.

msdda-fast serve &
python benchmarks/screenshot_page.py --out benchmarks/results/page.png
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the page")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1200, help="pixels")
    parser.add_argument("--height", type=int, default=1010, help="pixels")
    parser.add_argument("--seed", default="3", help="seed of the image")
    parser.add_argument("--dark", action="store_true", help="dark color scheme")
    parser.add_argument("--whole", action="store_true", help="the whole page, not only its top")
    chosen = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": chosen.width, "height": chosen.height},
            color_scheme="dark" if chosen.dark else "light",
        )
        page.on("console", lambda message: print(message.text))
        page.set_default_timeout(300_000)
        page.goto(chosen.url)
        page.fill("#seed", chosen.seed)
        for _ in range(15):
            page.locator("input[type=range]").first.press("ArrowRight")
        page.click("#regions summary")
        page.locator("#layers input").first.check()
        box = page.locator("#paint").bounding_box()
        x, y, side = box["x"], box["y"], box["width"]
        page.mouse.move(x + 0.2 * side, y + 0.1 * side)
        page.mouse.down()
        page.mouse.move(x + 0.2 * side, y + 0.9 * side, steps=5)
        page.mouse.up()
        page.click("#generate")
        page.wait_for_selector("#download:not([hidden])")
        page.locator(".tile:disabled").first.wait_for(state="attached")
        page.locator(".tile:disabled").first.wait_for(state="detached")
        page.wait_for_timeout(500)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=chosen.out, full_page=chosen.whole)
        print(page.inner_text("#facts"))
        browser.close()


if __name__ == "__main__":
    main()
