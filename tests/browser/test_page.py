"""The page at ``/`` in a real browser: search, history, ranking, walk, comparison, keyboard, errors, themes.

``TAWIN_SCREENSHOTS=tests/browser`` writes the pictures of this folder anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from tests.browser.chromium import Browser, browser, missing
from tests.browser.shop import TITLES, shop
from tests.serve.scene import Scene

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
PICTURES = os.environ.get("TAWIN_SCREENSHOTS", "")
WIDE, NARROW = {"width": 1240, "height": 880}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def scene(folder: Path) -> Iterator[Scene]:
    with shop(folder) as running:
        yield running


@pytest.fixture
def wide(scene: Scene, tmp_path: Path) -> Iterator[Browser]:
    """The page on a desk; at the end it has no errors and has asked its own server only."""
    with browser(tmp_path / "profile", viewport=WIDE, color_scheme="light") as found:
        found.page.goto(scene.data)
        found.page.locator("#found li").first.wait_for()
        yield found
        assert found.errors == []
        assert {urlsplit(url).netloc for url in found.requests} == {urlsplit(scene.data).netloc}


def picture(found: Browser, name: str) -> None:
    if PICTURES:
        found.page.mouse.move(0, 0)
        found.page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def search(found: Browser, text: str, matches: int) -> None:
    """Type, and wait until the list is that of the text."""
    found.page.locator("#search").fill(text)
    found.page.wait_for_function("n => document.getElementById('total').textContent === n", arg=str(matches))


def number_of(text: str) -> int:
    return sum(text in title.lower() for title in TITLES)


def ranked(found: Browser, count: int, selector: str = "#ranked") -> list[str]:
    """Titles of a ranking, once it has so many."""
    found.page.wait_for_function(
        "([s, n]) => document.querySelectorAll(`${s} > li`).length === n", arg=[selector, count]
    )
    return found.texts(f"{selector} .name")


def test_search_history_ranking_and_the_walk(scene: Scene, wide: Browser) -> None:
    search(wide, "running shoes", number_of("running shoes"))
    shown = wide.texts("#found .name")
    assert shown == [title for title in TITLES if "running shoes" in title]
    wide.page.locator("#found button").nth(1).click()
    first = ranked(wide, 10)
    assert wide.texts("#history .name") == [shown[1]]
    search(wide, "MUG", number_of("mug"))
    with wide.page.expect_response("**/v1/recommendations"):
        wide.page.locator("#found button").first.click()
    wide.page.wait_for_function("t => document.querySelector('#ranked .name').innerText !== t", arg=first[0])
    with scene.client("") as client:
        expected = client.recommend(
            [TITLES.index(title) for title in wide.texts("#history .name")], n=10, beams=20, exclude_history=True,
            return_tokens=True,
        )  # fmt: skip
    assert ranked(wide, 10) == [item.title for item in expected.items]
    bars = [box["width"] for box in (bar.bounding_box() for bar in wide.page.locator("#ranked .track i").all()) if box]
    assert bars == sorted(bars, reverse=True)
    assert bars[-1] > 0
    top = expected.items[0]
    assert wide.texts("#ranked .value")[0] == f"{100 * top.probability:.1f} %"
    walks = wide.texts("#tree .name")
    assert sorted(walks) == sorted(f"→ {item.title}" for item in expected.items)
    # the probabilities of the branches that lead to the best item multiply to its own
    path = wide.page.locator("#tree .branch", has_text=f"→ {top.title}").first.evaluate(
        "node => { const found = []; for (let li = node.closest('li'); li; li = li.parentElement.closest('li'))"
        " found.push(parseFloat(li.querySelector('.value').innerText)); return found; }"
    )
    product = 1.0
    for percent in path:
        product *= percent / 100
    assert product == pytest.approx(top.probability, rel=0.05, abs=1e-3)
    picture(wide, "page")


def test_keyboard_only(wide: Browser) -> None:
    """Tab to the search, type, arrows and Enter; then remove an item and recommend again."""
    keys = wide.page.keyboard
    for _ in range(4):
        keys.press("Tab")
        if wide.focused() == "search":
            break
    assert wide.focused() == "search"
    keys.type("jacket")
    wide.page.wait_for_function("n => document.getElementById('total').textContent === n", arg=str(number_of("jacket")))
    names = wide.texts("#found .name")
    keys.press("Enter")  # the first one
    ranked(wide, 10)
    for _ in range(2):
        keys.press("ArrowDown")
    assert wide.focused() == f"Add {names[1]}"
    keys.press("Enter")
    wide.page.wait_for_function("() => document.querySelectorAll('#history li').length === 2")
    assert wide.texts("#history .name") == names[:2]
    keys.press("ArrowUp")
    keys.press("ArrowUp")
    assert wide.focused() == "search"
    seen = []
    while f"Remove {names[0]}" not in seen:
        keys.press("Tab")
        seen.append(wide.focused())
        assert len(seen) < 30, seen
    outline = wide.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # whoever uses the keyboard sees where it is
    keys.press("Enter")
    wide.page.wait_for_function("() => document.querySelectorAll('#history li').length === 1")
    assert wide.focused() == f"Remove {names[1]}"
    while wide.focused() != "Recommend":
        keys.press("Tab")
    with wide.page.expect_response("**/v1/recommendations") as answered:
        keys.press("Enter")
    assert answered.value.status == 200


def test_two_weight_versions_side_by_side(scene: Scene, folder: Path, wide: Browser) -> None:
    search(wide, "boots", number_of("boots"))
    wide.page.locator("#found button").first.click()
    before = ranked(wide, 10)
    old = scene.engine.weights
    wide.page.get_by_role("button", name="Keep to compare").click()
    with scene.controller() as control:
        new = control.update_weights(str(folder / "weights")).weight_version
    assert new == old + 1
    with wide.page.expect_response("**/v1/recommendations"):
        wide.page.get_by_role("button", name="Recommend", exact=True).click()
    wide.page.get_by_text(f"weights {new}", exact=True).wait_for()
    assert ranked(wide, 10, "#kept-list") == before
    after = ranked(wide, 10)
    assert after != before
    assert f"weights {old}" in wide.texts("#kept-title .pill")
    assert f"weights {new}" in wide.texts("#now-title .pill")
    moves = wide.texts("#ranked .move")
    for place, (title, move) in enumerate(zip(after, moves, strict=True)):
        if title not in before:
            assert move == "new"
        elif before.index(title) == place:
            assert move == "="
        else:
            up = before.index(title) - place
            assert move == f"{'▲' if up > 0 else '▼'} {abs(up)}"
    left, right = (wide.page.locator(f"#{name}").bounding_box() for name in ("kept-list", "ranked"))
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]
    assert abs(left["y"] - right["y"]) < 2
    picture(wide, "compare")
    wide.page.get_by_role("button", name="Compare no longer").click()
    assert wide.page.locator("#kept").is_hidden()


def test_an_error_is_readable_and_goes_away(scene: Scene, tmp_path: Path) -> None:
    with browser(tmp_path / "profile", viewport=WIDE) as found:
        found.page.goto(scene.data)
        found.page.locator("#found button").first.click()
        ranked(found, 10)
        with scene.controller() as control:
            control.pause()
            try:
                found.page.get_by_role("button", name="Recommend", exact=True).click()
                alert = found.page.get_by_role("alert")
                found.page.wait_for_function("() => document.getElementById('problem').textContent !== ''")
                assert alert.inner_text() == "the server is paused; try again later (status 503)"
                assert alert.is_visible()
            finally:
                control.resume()
        found.page.get_by_role("button", name="Recommend", exact=True).click()
        found.page.wait_for_function("() => document.getElementById('problem').textContent === ''")
        assert alert.is_hidden()
        assert [error for error in found.errors if "503" not in error] == []  # the browser itself notes the reply


def test_dark_and_narrow(scene: Scene, tmp_path: Path) -> None:
    """Nothing sticks out of a telephone's screen, and the dark theme is dark."""
    with browser(tmp_path / "profile", viewport=NARROW, color_scheme="dark", device_scale_factor=1.5) as found:
        found.page.goto(scene.data)
        search(found, "sleeping", number_of("sleeping"))
        found.page.locator("#found button").first.click()
        ranked(found, 10)
        width = found.page.evaluate("document.documentElement.scrollWidth")
        assert width <= NARROW["width"]
        assert contrast(found, "body") > 7
        for selector in (".quiet", "#ranked .value", ".pill", "#ask", "#tree code"):
            assert contrast(found, selector) > 4.5, selector
        picture(found, "narrow")
        assert found.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(scene: Scene, tmp_path: Path, scheme: str) -> None:
    """WCAG's 4.5 for every text that is shown, against what is painted behind it."""
    with browser(tmp_path / "profile", viewport=WIDE, color_scheme=scheme) as found:
        found.page.goto(scene.data)
        found.page.locator("#found button").first.click()
        ranked(found, 10)
        found.page.locator("#pin").click()
        for selector in (
            "h1",
            "h2",
            ".quiet",
            ".pill",
            "#ranked .name",
            "#found .name",
            "#tree .name",
            ".move",
            "kbd",
            ".which",
            "#now-title .which",
        ):
            assert contrast(found, selector) > 4.5, selector


def contrast(found: Browser, selector: str) -> float:
    """WCAG's contrast of an element's text and the nearest background that is not transparent."""
    return float(found.page.evaluate(CONTRAST, selector))


CONTRAST = """(selector) => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const node = document.querySelector(selector);
  let behind = node;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(numbers).map(light);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
