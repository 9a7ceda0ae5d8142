"""The pictures in a real browser: on a phone and on a desk, in light and dark, on paper, by keyboard and by ear."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, Browser
from tests.stories import HOSTILE, chain, chain_thought_of, fan, hostile, many_stages, thought_of, three_stages, twelve_stages

PHONE, DESK = 390, 1280
REPORTS = {"three": three_stages, "twelve": twelve_stages, "many": many_stages, "hostile": hostile}
GRAPHS = REPORTS | {"chain": lambda: chain(30), "fan": lambda: fan(60)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("SAGA_BROWSER") == "required":
            pytest.fail("SAGA_BROWSER=required, and there is no chromium on the PATH: apt-get install chromium")
        pytest.skip("there is no chromium on the PATH")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, make in REPORTS.items():
        (folder / f"{name}.html").write_text(make().to_html(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in REPORTS}


def every_details(browser: Browser, *, is_open: bool) -> None:
    browser.evaluate(f"document.querySelectorAll('details').forEach(it => it.open = {json.dumps(is_open)})")


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_no_wider_than_its_window_and_the_browser_has_nothing_to_complain_of(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)

    assert browser.evaluate("innerWidth") == width
    for is_open in (False, True):
        every_details(browser, is_open=is_open)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []


def test_names_and_errors_of_ten_thousand_letters_leave_the_page_its_shape(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])

    assert browser.evaluate("document.querySelector('table').getBoundingClientRect().width") < DESK
    assert browser.evaluate("document.querySelector('table').getBoundingClientRect().height") < 2_000
    assert browser.evaluate("document.querySelector('#graph').getBoundingClientRect().top") < 800
    assert browser.evaluate("document.querySelector('.cause').textContent.length") > 10_000


@pytest.mark.parametrize("view", ["graph", "timeline"])
@pytest.mark.parametrize("name", REPORTS)
def test_a_picture_by_itself_gives_the_browser_nothing_to_complain_of(browser: Browser, tmp_path: Path, name: str, view: Any) -> None:
    picture = tmp_path / "picture.svg"
    picture.write_text(REPORTS[name]().to_svg(view), encoding="utf-8")

    browser.open(picture)

    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.tagName") == "svg"


def test_hostile_names_outputs_and_errors_become_text_and_nothing_else(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    every_details(browser, is_open=True)

    assert "hacked" in browser.evaluate("document.body.textContent")
    assert browser.evaluate("document.title").startswith("--- %%{init}%% <script>")
    assert browser.evaluate("[...document.querySelectorAll('script, img, iframe, object, embed, link, base, form')].length") == 0
    assert browser.evaluate("[...document.querySelectorAll('*')].every(it => it.getAttributeNames().every(name => !name.startsWith('on')))")
    assert browser.evaluate("[...document.querySelectorAll('a')].every(it => it.getAttribute('href').startsWith('#'))")
    shown = browser.evaluate("[...document.querySelectorAll('summary h3')].map(it => it.textContent)")
    assert len(shown) == len(HOSTILE)
    assert shown[0] == HOSTILE[0]
    assert shown[8] == HOSTILE[8]


@pytest.mark.parametrize("hostile_id", ["s\u2069\u202ex", "s\u202ex"])
def test_no_id_turns_round_what_is_read_behind_it(browser: Browser, tmp_path: Path, hostile_id: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(three_stages().model_copy(update={"saga_id": hostile_id}).to_html(), encoding="utf-8")

    browser.open(page)

    left = """(() => {
        const times = document.querySelector('header time').firstChild, range = document.createRange();
        return [0, 9].map(place => (range.setStart(times, place), range.setEnd(times, place + 1), range.getBoundingClientRect().left));
    })()"""
    year, day = browser.evaluate(left)
    assert year < day


def test_a_click_on_a_stage_opens_its_details(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["twelve"])
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0

    browser.click("svg a[href='#stage-9'] .saga-face")

    browser.until("document.querySelector('details[open]') !== null")
    assert browser.evaluate("document.querySelector('details[open] summary').innerText").split() == ["!", "charge_card", "stuck"]
    assert browser.evaluate("document.activeElement.id") == "stage-9"
    top = browser.evaluate("document.querySelector('details[open] summary').getBoundingClientRect().top")
    assert 0 <= top < 200


def test_the_keyboard_reaches_every_stage_and_opens_it(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["twelve"])
    where = "(it => it.closest('svg') ? 'graph ' + it.getAttribute('href') : it.tagName + ' ' + (it.getAttribute('href') ?? it.innerText))"

    visited: list[str] = []
    while not visited or visited[-1] != "BODY":
        browser.press("Tab")
        visited.append(browser.evaluate(f"document.activeElement === document.body ? 'BODY' : {where}(document.activeElement)"))
        assert len(visited) < 200

    anchors = [f"#stage-{place}" for place in range(1, 13)]
    assert visited[0] == "A #stages"
    assert [place for place in visited if place.startswith("graph")] == [f"graph {anchor}" for anchor in anchors]
    assert [place for place in visited if place.startswith("A #stage-")] == [f"A {anchor}" for anchor in anchors]
    assert sum(place.startswith("SUMMARY") for place in visited) == 12
    browser.evaluate("document.querySelector('svg a[href=\"#stage-2\"]').focus()")
    browser.press("Enter")
    browser.until("document.activeElement.id === 'stage-2'")
    assert browser.evaluate("document.querySelector('#stage-2').closest('details').open")


def test_on_paper_the_details_are_open_and_dark_is_light(browser: Browser, pages: dict[str, Path]) -> None:
    def height() -> Any:
        return browser.evaluate("document.querySelector('details').getBoundingClientRect().height")

    def ground() -> Any:
        return browser.evaluate("getComputedStyle(document.body).backgroundColor")

    browser.open(pages["three"], scheme="dark")
    closed = height()
    assert ground() == "rgb(13, 17, 23)"

    browser.pretend("dark", "print")

    assert height() > closed + 100
    assert ground() == "rgb(255, 255, 255)"
    assert browser.evaluate("document.querySelector('nav').getBoundingClientRect().height") == 0


def test_a_screen_reader_hears_landmarks_headings_the_table_and_each_stage(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["three"])

    heard = browser.accessible()

    def named(role: str) -> list[str]:
        return [it["name"] for it in heard if it["role"] == role]

    assert len(named("main")) == len(named("banner")) == 1
    assert named("navigation") == ["On this page"]
    assert named("heading") == ["book_trip", "Graph", "Timeline", "Stages", "Details", "reserve_seat", "reserve_room", "charge_card"]
    assert named("table") == ["The 3 stages, each after those that it depends on"]
    assert named("columnheader") == ["Stage", "State", "Attempts", "Time", "Undoing", "What happened"]
    assert named("rowheader") == ["reserve_seat", "reserve_room", "charge_card"]
    assert named("region") == ["Graph, scrolls", "Timeline, scrolls", "Table of stages, scrolls"]
    assert "Graph of book_trip: 3 stages" in named("group") + named("graphics-document")
    assert "Timeline of book_trip; the details of each stage have the same times" in named("image")
    links = named("link")
    assert "reserve_seat: undone, 1 attempt, 420.0 ms; undone 2nd in 266.0 ms" in links
    assert "charge_card: failed, 2 attempts, 549.0 ms; raised at attempt 2: CardDeclined: the card was declined" in links
    assert [name.split() for name in named("DisclosureTriangle")] == [
        ["reserve_seat", "undone"],
        ["reserve_room", "undone"],
        ["charge_card", "failed"],
    ]


def test_a_picture_by_itself_is_an_image_with_a_name_and_a_description(browser: Browser, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    picture.write_text(three_stages().to_svg(), encoding="utf-8")

    browser.open(picture)

    (heard,) = (it for it in browser.accessible() if it["role"] == "image")
    assert heard["name"] == "book_trip: compensated after 1.24 s"
    assert heard["description"].startswith("compensated after 1.24 s. Cause: stage 'charge_card' raised")


@pytest.mark.parametrize(("scheme", "paper"), [("light", [255, 255, 255]), ("dark", [13, 17, 23])])
def test_in_a_readme_a_picture_follows_the_readers_scheme(browser: Browser, tmp_path: Path, scheme: str, paper: list[int]) -> None:
    data = base64.b64encode(three_stages().to_svg().encode()).decode()
    readme = tmp_path / "readme.html"
    readme.write_text(f'<!DOCTYPE html><title>readme</title><img id="it" alt="" src="data:image/svg+xml;base64,{data}">')

    browser.open(readme, scheme=scheme)
    pixel = browser.evaluate(
        "(async () => { await it.decode(); const canvas = document.createElement('canvas'); canvas.width = canvas.height = 20;"
        "const pen = canvas.getContext('2d'); pen.drawImage(it, 0, 0); return [...pen.getImageData(12, 12, 1, 1).data] })()"
    )

    assert pixel == [*paper, 255]


@pytest.mark.parametrize("name", GRAPHS)
def test_no_text_leaves_its_box_and_no_arrow_crosses_one(browser: Browser, tmp_path: Path, name: str) -> None:
    picture = tmp_path / "picture.svg"
    picture.write_text(GRAPHS[name]().to_svg(), encoding="utf-8")

    browser.open(picture)
    found = browser.evaluate(
        """(() => {
        const faces = [...document.querySelectorAll('.saga-face')];
        const boxes = faces.map(face => face.getBBox());
        const outside = faces.flatMap((face, index) => [...face.parentNode.querySelectorAll('.saga-name, .saga-faint')].filter(text => {
            const it = text.getBBox(), box = boxes[index];
            return it.x < box.x + 30 || it.x + it.width > box.x + box.width || it.y < box.y || it.y + it.height > box.y + box.height;
        })).map(text => text.textContent);
        let crossed = 0, points = 0;
        for (const line of document.querySelectorAll('svg > g > .saga-run, svg > g > .saga-back')) {
            if (line.parentNode.querySelector('.saga-face') === null) continue;
            for (const stretch of line.getAttribute('d').split('M').slice(1)) {
                const one = document.createElementNS('http://www.w3.org/2000/svg', 'path');
                one.setAttribute('d', 'M' + stretch);
                for (let at = 0; at <= one.getTotalLength(); at += 6) {
                    const point = one.getPointAtLength(at);
                    points += 1;
                    crossed += boxes.some(box => point.x > box.x + 2 && point.x < box.x + box.width - 2
                        && point.y > box.y + 2 && point.y < box.y + box.height - 2);
                }
            }
        }
        return {boxes: boxes.length, outside, crossed, points} })()"""
    )

    assert found["boxes"] == len(GRAPHS[name]().stages)
    assert found["outside"] == []
    assert found["points"] > 40
    assert found["crossed"] == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_browser_makes_of_the_colours_can_be_read(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    browser.open(pages["twelve"], scheme=scheme)

    worst = browser.evaluate(
        """(() => {
        const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        const light = colour => channels(colour).reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
        const contrast = (one, two) => (Math.max(light(one), light(two)) + .05) / (Math.min(light(one), light(two)) + .05);
        const style = it => getComputedStyle(it);
        const pairs = [...document.querySelectorAll('.saga-face')].flatMap(face =>
            [...face.parentNode.querySelectorAll('.saga-name, .saga-faint')].map(text => [style(text).fill, style(face).fill]));
        for (const sign of document.querySelectorAll('.saga-sign'))
            pairs.push([style(sign).fill, style(sign.parentNode.querySelector('.saga-pill')).fill]);
        for (const sign of document.querySelectorAll('span.saga-pill')) pairs.push([style(sign).color, style(sign).backgroundColor]);
        for (const text of document.querySelectorAll('h1, h2, p, th, td, dt, dd, .faint, caption'))
            pairs.push([style(text).color, style(document.body).backgroundColor]);
        return [pairs.length, Math.min(...pairs.map(pair => contrast(...pair)))] })()"""
    )

    assert worst[0] > 100
    assert worst[1] >= 4.5


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_an_explanation_of_hostile_names_shows_them_as_text_and_nothing_else(browser: Browser, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(chain_thought_of(HOSTILE).to_html(), encoding="utf-8")

    browser.open(page, width=width)

    assert browser.complaints == []
    assert browser.evaluate("document.title") != "hacked"
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('table').getBoundingClientRect().height") < 5_000


def test_a_click_on_a_stage_shows_the_picture_of_its_failure_and_no_other(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(thought_of().to_html(), encoding="utf-8")
    shown = "[...document.querySelectorAll('section')].filter(it => it.offsetHeight > 0).map(it => it.id).join()"

    browser.open(page)
    assert browser.evaluate(shown).count("if-") == 8

    browser.click("tbody a[href='#if-7']")
    browser.until(f"{shown} === 'if-7'")
    browser.click("section:target svg a[href='#if-2']")
    browser.until(f"{shown} === 'if-2'")
    browser.click("section:target > p > a")
    browser.until(f"{shown}.split(',').length === 8")
