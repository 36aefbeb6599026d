"""The page in a real browser: no errors, no requests, nothing hidden, cut off or hard to see, on screens and phones.

Skipped where Chromium is absent (apt-get install chromium); in CI that is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import report_cases as cases
import study_cases as studies
import test_report_advice as advice_cases
import test_report_verdicts as verdict_cases
from test_recommendation import ALL
from test_report import save

from bench import recommendation
from bench.recommendation import Constraint
from bench.report import advice, publish, write

pytestmark = pytest.mark.browser

FIGURES = {
    "quick": 7, "hostile": 6, "oom": 1, "one": 0, "troubled": 1, "simulated": 5, "study": 3, "strange study": 1,
    "paper": 8, "sides": 3, "advice": 3, "none fits": 3,
}  # fmt: skip
SCREENS = [("quick", 1280, "dark"), ("quick", 768, "light"), ("quick", 390, "light")]
SCREENS += [(name, 768, "dark") for name in ("paper", "sides", "advice")]
SCREENS += [(name, width, scheme) for name in FIGURES for width, scheme in ((1280, "light"), (390, "dark"))]


def missing(what: str) -> Any:
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI needs it")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing("no Chromium: apt-get install chromium, or set CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no playwright: pip install playwright")
    with sync_playwright() as playwright:
        # As root Chromium refuses to start with its sandbox; the pages are our own.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=program, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One report a case."""
    root = tmp_path_factory.mktemp("reports")
    made: dict[str, Path] = {}
    for name, results, quality in (
        ("quick", *cases.quick()),
        ("hostile", *cases.hostile()),
        ("oom", cases.only_oom(), None),
        ("one", cases.one_cell(), None),
        ("troubled", cases.troubled(), None),
        ("simulated", cases.two_devices()[1], None),
    ):
        write([save(results, root / "runs" / name, quality)], root / name)
        made[name] = root / name / "index.html"
    for name, folder in (
        ("study", studies.save(root / "studies" / "study")),
        ("strange study", studies.save(root / "studies" / "strange", found=studies.hostile(), dense=studies.strange())),
    ):
        write([folder], root / name)
        made[name] = root / name / "index.html"
    results, quality = cases.llama()
    write([save(results, root / "runs" / "paper", quality)], root / "paper")
    write([save(one, root / "runs" / one.path.parent.name) for one in verdict_cases.sides()], root / "sides")
    for name, limits in (("advice", [Constraint("memory", 12)]), ("none fits", [Constraint("latency", 1.0)])):
        answer = recommendation.recommend(ALL, limits)
        publish.save(advice.build(answer, limits, ALL, [advice_cases.SOURCE]), root / name)
    made |= {name: root / name / "index.html" for name in ("paper", "sides", "advice", "none fits")}
    return made


@pytest.fixture(scope="module")
def axe() -> str:
    """The accessibility checker, as its Python package carries it."""
    try:
        import axe_playwright_python
    except ImportError:
        missing("no axe: pip install axe-playwright-python")
    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


class Visit:
    """A page that was opened, and all it said and asked for."""

    def __init__(self, browser: Any, page: Path, width: int, scheme: str, **options: Any) -> None:
        options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "offline": True, **options}
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("a dialog opened"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(page.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


# Text is cut off where its own box, or one around it, hides what does not fit and cannot be scrolled.
CLIPPED = """() => {
  const found = [];
  for (const element of document.querySelectorAll('body *:not(svg *):not(script)')) {
    const style = getComputedStyle(element);
    const hides = ['hidden', 'clip'].includes(style.overflowX) || ['hidden', 'clip'].includes(style.overflowY);
    if (hides && (element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1))
      found.push(element.tagName + ' ' + element.textContent.slice(0, 40));
    const box = element.getBoundingClientRect();
    const inside = element.closest('.scroll');
    if (!inside && box.width && (box.right > innerWidth + 1 || box.left < -1))
      found.push('outside: ' + element.tagName + ' ' + element.textContent.slice(0, 40));
  }
  return found;
}"""

# Figures whose texts meet or leave their picture. Extents are those of the browser's own font.
LABELS = """() => {
  const problems = [];
  let seen = 0;
  for (const svg of document.querySelectorAll('figure svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => [t.textContent, t.getBoundingClientRect()]);
    seen += texts.length;
    texts.forEach(([a, p], i) => {
      if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1 || p.bottom > frame.bottom + 1)
        problems.push('cut off: ' + a);
      const high = r => [r.top + 0.2 * r.height, r.bottom - 0.2 * r.height];  // boxes include the line's spacing
      for (const [b, q] of texts.slice(i + 1)) {
        const [pt, pb] = high(p), [qt, qb] = high(q);
        if (p.left < q.right - 1 && q.left < p.right - 1 && pt < qb && qt < pb) problems.push(a + ' meets ' + b);
      }
    });
  }
  return [seen, problems];
}"""


@pytest.mark.parametrize(("name", "width", "scheme"), SCREENS)
def test_a_page_is_whole_and_accessible(browser, pages, axe, name, width, scheme):
    with Visit(browser, pages[name], width, scheme) as visit:
        page = visit.page
        assert visit.messages == []
        assert visit.requests == [pages[name].as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate(CLIPPED) == []
        figures = page.evaluate(
            "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('svg')]"
            ".map(s => s.getBoundingClientRect()).filter(r => r.width > 200 && r.height > 80).length)"
        )
        assert figures == [1] * FIGURES[name]  # each shows the wide or the narrow drawing
        seen, problems = page.evaluate(LABELS)
        assert problems == []
        assert seen >= 8 * len(figures)
        labels = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
        assert all(len(label) > 40 for label in labels)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []
        assert len(found["passes"]) > 15  # it did look


def test_figures_follow_the_colour_scheme(browser, pages):
    def colours(scheme: str) -> tuple[str, str]:
        with Visit(browser, pages["quick"], 1280, scheme) as visit:
            return visit.page.evaluate(
                "[getComputedStyle(document.querySelector('svg text')).fill,"
                " getComputedStyle(document.documentElement).backgroundColor]"
            )

    assert colours("light") != colours("dark")
    assert colours("dark")[1] == "rgb(20, 23, 28)"


def test_tables_sort_by_number_and_go_back(browser, pages):
    column = "[...document.querySelectorAll('section:has(#cells) tbody tr')].map(r => r.cells[3].dataset.key)"
    heading = "section:has(#cells) th:nth-child(4)"
    with Visit(browser, pages["quick"], 1280, "light") as visit:
        page = visit.page
        before = page.evaluate(column)
        button = page.locator(f"{heading} button")
        button.click()
        assert page.get_attribute(heading, "aria-sort") == "ascending"
        values = [float(value) for value in page.evaluate(column) if value is not None]
        assert values == sorted(values)
        assert page.evaluate(column)[-6:] == [None] * 6  # cells without a time stay last
        button.press("Enter")
        assert page.get_attribute(heading, "aria-sort") == "descending"
        values = page.evaluate(column)
        assert [float(value) for value in values[:-6]] == sorted(map(float, values[:-6]), reverse=True)
        assert values[-6:] == [None] * 6
        button.click()
        assert page.evaluate(column) == before
        assert visit.messages == []


def test_tables_are_filtered_by_words(browser, pages):
    shown = "[...document.querySelectorAll('section:has(#cells) tbody tr')].filter(r => !r.hidden).length"
    with Visit(browser, pages["quick"], 1280, "light") as visit:
        field = visit.page.locator("section:has(#cells) .filter input")
        every = visit.page.evaluate(shown)
        field.fill("wanda eager")
        assert visit.page.evaluate(shown) == 3
        assert visit.page.locator("section:has(#cells) .filter output").inner_text() == f"3 of {every} rows"
        field.fill("-wanda -eager")
        assert visit.page.evaluate(shown) == 12
        visit.page.locator("section:has(#cells) th:nth-child(4) button").click()
        assert visit.page.evaluate(shown) == 12, "sorting leaves the filter"
        field.fill("")
        assert visit.page.evaluate(shown) == every
        assert visit.messages == []


def test_a_page_is_used_by_keyboard_alone(browser, pages):
    """Every control is reached by Tab, has a visible focus, and acts on a key."""
    with Visit(browser, pages["quick"], 1280, "light") as visit:
        page, seen = visit.page, []
        for _ in range(200):
            page.keyboard.press("Tab")
            tag, outline = page.evaluate(
                "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
            )
            if tag == "BODY":
                break
            seen.append(tag)
            assert outline != "none", tag
        assert {"A", "SUMMARY", "BUTTON", "INPUT"} <= set(seen)
        page.locator("figure summary").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('figure details').open")


def test_every_figure_says_where_it_comes_from(browser, pages):
    with Visit(browser, pages["sides"], 1280, "light", java_script_enabled=False) as visit:
        figures = visit.page.locator("figure")
        assert figures.count() == FIGURES["sides"]
        for place in range(figures.count()):
            figures.nth(place).locator("summary").click()
            text = figures.nth(place).locator("details").inner_text()
            assert {"base", "head"} <= set(text.split()), "both runs"
            assert "0123abc4567-dirty" in text
            name = figures.nth(place).get_attribute("id")
            assert figures.nth(place).locator(f"h3 a[href='#{name}']").count() == 1


def test_a_page_works_without_scripts(browser, pages):
    with Visit(browser, pages["quick"], 1280, "light", java_script_enabled=False) as visit:
        # Subjects, cells, perplexities, and how far predictions were off in each runtime.
        assert visit.page.locator("tbody tr").count() == 10 + 30 + 5 + 2
        assert visit.page.locator("th button").count() == 0


def test_the_policy_stops_what_is_not_ours(browser, pages):
    """The page's own policy, were a name ever to slip through: an injected script does not run, nothing is fetched."""
    with Visit(browser, pages["quick"], 1280, "light") as visit:
        visit.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">');"
            "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s)"
        )
        visit.page.wait_for_timeout(200)
        assert visit.page.evaluate("window.hit") is None


def test_standing_figures_open_on_their_own(browser, pages):
    with Visit(browser, pages["quick"].parent / "figures" / "latency-throughput.svg", 1280, "light") as visit:
        assert visit.page.evaluate("document.documentElement.getBoundingClientRect().width") > 800
        assert "AMD EPYC" in visit.page.evaluate("document.documentElement.textContent")
    image = pages["quick"].parent / "shown.html"
    image.write_text("<img src='figures/latency-throughput.png'>")
    with Visit(browser, image, 1280, "light") as visit:
        assert visit.page.evaluate("document.images[0].naturalWidth") == 1800


def test_print_is_light_and_wide(browser, pages):
    with Visit(browser, pages["quick"], 700, "dark") as visit:
        visit.page.emulate_media(media="print")
        assert visit.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert visit.page.evaluate("getComputedStyle(document.querySelector('svg.wide')).display") == "block"
        assert visit.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_checks_can_fail(browser, pages, tmp_path):
    """Planted faults are found by the very checks above."""
    text = pages["quick"].read_text(encoding="utf-8")
    planted = (
        "<p style='width: 2000px'>far too wide</p><div style='overflow: hidden; width: 40px; white-space: nowrap'>"
        "this text is cut off</div><img src='https://example.com/x.png'>"
    )
    page = tmp_path / "index.html"
    page.write_text(text.replace("<main>", f"<main>{planted}"), encoding="utf-8")
    with Visit(browser, page, 390, "light") as visit:
        assert visit.messages != []
        assert visit.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        found = visit.page.evaluate(CLIPPED)
        assert any("this text is cut off" in one for one in found)
        assert any("far too wide" in one for one in found)
