# SPDX-License-Identifier: Apache-2.0
"""The page at `/`: its files over HTTP, and in a Chromium of this machine with a keyboard."""

import re
from decimal import Decimal

import pytest

import msdda_fast as mf
from msdda_fast.serve.web_page import TYPES
from tests.serve.conftest import Running, until

PHONE = {"width": 360, "height": 740}


class TestFiles:
    @pytest.mark.parametrize("path", ["", *(name for name in TYPES if name != "index.html")])
    def test_are_served_with_their_type_and_a_strict_policy(self, served, path):
        answer = served.http.get(f"/{path}")
        assert answer.status_code == 200 and answer.text
        assert answer.headers["content-type"].startswith(TYPES[path or "index.html"])
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"

    def test_nothing_in_them_is_inline_or_from_elsewhere(self, served):
        for name in TYPES:
            text = served.http.get("/" if name == "index.html" else f"/{name}").text
            assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("HTTP", "")
            assert not re.search(r"\son\w+=|\sstyle=|<style|<script>|@import|innerHTML", text)

    @pytest.mark.parametrize(
        "path",
        ["/index.html", "/page/", "/../settings.py", "/%2e%2e/app.py", "/page.css/../app.py"],
    )
    def test_no_other_file_can_be_asked_for(self, served, path):
        answer = served.http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"

    def test_the_page_needs_no_key(self, serve):
        running = serve(warm=False, settings={"api_key": "sesame"})
        assert running.http.get("/").status_code == 200
        assert running.http.get("/v1/objectives").status_code == 401


@pytest.fixture(scope="module")
def three(tiny):
    """A service of three objectives."""
    objectives = {**tiny.objectives(), "plain": mf.Objective.base()}
    pipe = tiny.load(objectives=objectives)
    one = Running(mf.Engine(pipe, max_batch=2, max_wait_ms=0), max_steps=4)
    until(lambda: one.service.is_ready)
    yield one
    one.stop()


@pytest.mark.full  # a browser
def test_with_the_keyboard_alone(served, visit):
    visit = visit(served.url)
    page = visit.page
    page.get_by_label("Prompt", exact=True).fill("a red dog")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    assert (
        page.get_by_label("warm to cool").get_attribute("aria-valuetext") == "warm 50 %, cool 50 %"
    )
    page.get_by_label("Prompt", exact=True).press("Enter")
    before = visit.drawn()
    page.locator("#live").evaluate("box => { box.checked = false }")
    page.get_by_label("warm to cool").focus()
    for _ in range(3):
        page.keyboard.press("PageUp")
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")
    page.locator("#result[aria-busy]").wait_for(state="attached")
    page.locator("#result:not([aria-busy])").wait_for()
    assert visit.drawn() != before
    sent = visit.bodies[5]["weights"]
    assert sum(Decimal(str(w)) for w in sent.values()) == 1 and sent["cool"] > 0.6
    assert visit.bodies[5]["stream"] and visit.bodies[5]["partial_images"] == 3
    assert "in the queue" in page.inner_text("#detail")
    assert page.get_attribute("#image", "alt").startswith("a red dog (warm")
    assert page.get_attribute("#download", "download").endswith(".png")
    # a step along the strip selects that point
    right = page.get_by_role("button", name=re.compile("^warm")).last
    name = right.get_attribute("aria-label")
    right.focus()
    page.keyboard.press("Enter")
    page.locator(f'.tile[aria-current][aria-label="{name}"]:focus').wait_for()
    assert page.locator(".sliders input").get_attribute("aria-valuetext") == name
    assert visit.console == []


@pytest.mark.full  # a browser
def test_the_image_follows_the_slider(served, visit):
    visit = visit(served.url)
    visit.page.fill("#prompt", "a blue cat")
    visit.page.click("#generate")
    before = visit.drawn()
    visit.page.locator(".sliders input").press("Home")
    visit.page.locator(f'#image:not([src="{before}"])').wait_for()
    visit.drawn()
    assert [b["weights"] for b in visit.bodies if b["weights"]["warm"] == 1]
    assert visit.console == []


@pytest.mark.full  # a browser
def test_strength_is_sent_and_shown(served, visit):
    visit = visit(served.url)
    page = visit.page
    page.fill("#prompt", "a blue cat")
    strength = page.get_by_label("Strength")
    assert strength.get_attribute("aria-valuetext") == page.inner_text("#strength-shown") == "100 %"
    page.click("#generate")
    before = visit.drawn()
    assert all("strength" not in body for body in visit.bodies)
    sent = len(visit.bodies)
    for _ in range(10):
        strength.press("ArrowRight")
    page.locator(f'#image:not([src="{before}"])').wait_for()
    visit.drawn()
    assert strength.get_attribute("aria-valuetext") == page.inner_text("#strength-shown") == "150 %"
    assert {body["strength"] for body in visit.bodies[sent:]} == {1.5}
    assert page.get_attribute("#image", "alt").endswith("; strength 150 %)")
    assert page.get_attribute("#download", "download").endswith("-strength-150.png")
    assert visit.console == []


@pytest.mark.full  # a browser
def test_three_objectives_on_a_phone(three, visit):
    visit = visit(three.url, viewport=PHONE, color_scheme="dark", reduced_motion="reduce")
    page = visit.page
    page.fill("#prompt", "a red dog")
    balance = page.locator("#early")
    balance.get_by_label("plain").press("End")
    assert [s.get_attribute("aria-valuetext") for s in page.locator(".sliders input").all()] == [
        "0 %", "0 %", "100 %",
    ]  # fmt: skip
    box = page.locator(".triangle").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 40)  # beyond the first corner
    page.mouse.up()
    assert balance.get_by_label("warm").get_attribute("aria-valuetext") == "100 %"
    page.mouse.click(box["x"] + 0.45 * box["width"], box["y"] + 0.63 * box["height"])
    balance.get_by_label("cool").press("ArrowRight")
    page.click("#generate")
    visit.drawn()
    assert page.locator(".tile").count() == 4
    for body in visit.bodies:
        assert sum(Decimal(str(w)) for w in body["weights"].values()) == 1
    page.click("#more summary")
    assert visit.sideways() <= 0
    assert visit.console == []


@pytest.mark.full  # a browser
@pytest.mark.parametrize(
    ("field", "text", "error"),
    [
        ("prompt", "a " * 99, "tokens"),
        ("steps", "51", "50"),  # the browser's words
        ("seed", "", ""),
        ("negative_prompt", "a " * 99, "tokens"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(served, visit, field, text, error):
    visit = visit(served.url)
    page = visit.page
    page.fill("#prompt", "a red dog")
    page.click("#more summary")
    page.fill(f"#{field}", text)
    page.click("#generate")
    if not error:
        visit.drawn()  # a random one
        return
    assert error in page.locator(f"#error-{field}:not(:empty)").inner_text()
    wrong = page.locator("[aria-invalid]")
    assert wrong.get_attribute("id") == field
    assert wrong.get_attribute("aria-describedby") == f"error-{field}"
    page.fill(f"#{field}", "4" if field == "steps" else "a red dog")
    page.click("#generate")
    visit.drawn()
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.full  # a browser
def test_a_full_line_says_when_to_come_back(serve, visit):
    running = serve(queue_limit=1, max_batch=1, max_wait_ms=0)
    visit = visit(running.url)
    visit.page.route(
        "**/v1/images/generations",
        lambda route: route.fulfill(
            status=429,
            headers={"Retry-After": "7"},
            json={"error": {"message": "the queue is full", "param": None}},
        ),
    )
    visit.page.click("#generate")
    visit.page.locator("#error:not(:empty)").wait_for()
    assert visit.page.inner_text("#error") == "The queue is full. Try again in 7 s."
    assert visit.page.get_attribute("#error", "role") == "alert"


@pytest.mark.full  # a browser
def test_a_key_is_asked_for(serve, visit):
    running = serve(settings={"api_key": "sésame"})
    visit = visit(running.url)
    page = visit.page
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#key .hint", has_text="is wrong").wait_for()
    page.get_by_label("API key").fill("sésame")
    page.keyboard.press("Enter")
    page.locator("#key").wait_for(state="hidden")
    page.fill("#prompt", "a red dog")
    page.click("#generate")
    visit.drawn()
    assert page.evaluate("localStorage.length + document.cookie.length") == 0


@pytest.mark.full  # a browser
def test_everything_has_a_name_and_one_id(served, visit):
    page = visit(served.url).page
    page.click("#more summary")
    for control in page.locator("input, textarea, select, button, a").all():
        if control.is_visible():
            assert control.evaluate(
                "e => (e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())"
            )
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.get_attribute("html", "lang") == "en" and page.title()
    assert page.locator("h1").count() == page.locator("main").count() == 1
