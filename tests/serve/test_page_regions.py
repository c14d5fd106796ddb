# SPDX-License-Identifier: Apache-2.0
"""The page: regions, an image to start from, other weights in late steps."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image


@pytest.mark.full  # a browser
def test_another_balance_in_the_late_steps(served, visit, asked):
    visit = visit(served.url)
    page = visit.page
    page.fill("#prompt", "a red dog")
    page.get_by_label("warm to cool").press("Home")
    page.get_by_label("Another balance in the late steps").check()
    page.get_by_label("warm to cool, late steps").press("End")
    page.click("#generate")
    visit.drawn()
    early, late = {"warm": 1, "cool": 0}, {"warm": 0, "cool": 1}
    assert asked[0].weights == {"500-1000": early, "0-500": late}
    assert len(asked) == 3 and all(r.weights["0-500"] == late for r in asked)  # the strip
    assert visit.console == []


@pytest.mark.full  # a browser
def test_regions_are_painted(served, visit, asked):
    visit = visit(served.url)
    page = visit.page
    page.fill("#prompt", "a red dog")
    page.locator("#early input").press("Home")  # warm, where nothing is painted
    page.click("#regions summary")
    page.locator("#layers").get_by_label("cool").check()
    box = page.locator("#paint").bounding_box()
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + 0.8 * side, y)
    page.mouse.down()
    page.mouse.move(x + 0.8 * side, y + side, steps=3)
    page.mouse.up()
    page.locator("#layers").get_by_label("warm").check()
    page.locator("#paint").focus()
    for _ in range(10):
        page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")  # over what was painted, halfway up
    page.click("#generate")
    visit.drawn()
    mask = np.asarray(asked[0].masks["warm"], float) / 255
    assert asked[0].masks.keys() == {"warm"} and mask.shape == (32, 32)
    assert mask[2, 25] == mask[30, 25] == 0 and mask[16, 25] == 1 and (mask[:, :20] == 1).all()
    assert page.locator("#ranges").is_disabled()
    # cool everywhere else: the strip's other end
    edge = next(r for r in asked if np.asarray(r.masks["warm"])[0, 0] < 200)
    assert np.asarray(edge.masks["warm"])[16, 25] == 255
    page.click("#clear")
    page.locator("#ranges:enabled").wait_for()
    page.click("#generate")
    visit.drawn()
    assert asked[-1].masks is None
    assert visit.console == []


@pytest.mark.full  # a browser
def test_an_image_to_start_from(served, visit, asked, tmp_path):
    visit = visit(served.url)
    page = visit.page
    image = Image.new("RGB", (96, 64), "red")
    image.paste("white", (16, 0, 80, 64))
    image.save(tmp_path / "a.png")
    page.fill("#prompt", "a red dog")
    page.click("#start summary")
    page.set_input_files("#image-file", tmp_path / "a.png")
    page.get_by_label("Drawn anew").press("ArrowRight")
    page.click("#regions summary")
    page.locator("#layers").get_by_label("repainted").check()
    page.locator("#paint").focus()
    page.keyboard.press(" ")
    page.click("#generate")
    visit.drawn()
    for request in asked:
        assert request.image.size == (32, 32) and np.asarray(request.image).min() > 200
        mask = np.asarray(request.mask_image)
        assert mask[16, 16] == 255 and mask[0, 0] == 0 and request.image_strength == 0.65
    page.get_by_role("button", name="Remove").click()
    page.click("#generate")
    visit.drawn()
    assert asked[-1].image is None and page.locator("#layers label").count() == 2
    (tmp_path / "b.png").write_text("no image")
    page.set_input_files("#image-file", tmp_path / "b.png")
    page.locator("#error-image:not(:empty)").wait_for()
    assert visit.console == []


@pytest.mark.full  # a browser
def test_what_the_model_cannot_do_is_not_there(served, visit, monkeypatch):
    facts = served.service.facts
    monkeypatch.setattr(
        served.service, "facts", replace(facts, capabilities=dict.fromkeys(facts.capabilities))
    )
    visit = visit(served.url)
    page = visit.page
    page.fill("#prompt", "a red dog")
    page.click("#more summary")
    for part in ("#start", "#regions", "#guidance-field", "#negative-field"):
        assert page.locator(part).is_hidden()
    page.click("#generate")
    visit.drawn()
    assert not {"partial_images", "progress"} & visit.bodies[0].keys()
