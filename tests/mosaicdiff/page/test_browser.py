"""A report in a real browser, headless, at the width of a desk and of a phone.

Needs Chromium (`apt-get install chromium`, or its path in CHROMIUM) and `pip install playwright`,
whose own download of a browser is not needed.
"""

import os
import shutil
from dataclasses import replace

import pytest

from mosaicdiff.page import make_page, write_page

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
try:
    from playwright import sync_api as playwright
except ImportError:
    playwright = None
#: Set by `make test-browser`: to skip would then be to say that all is well.
REQUIRED = bool(os.environ.get("MOSAIC_REQUIRE_BROWSER"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        playwright is None and not REQUIRED, reason="no playwright: pip install playwright"
    ),
    pytest.mark.skipif(
        CHROMIUM is None and not REQUIRED, reason="no Chromium: apt-get install chromium"
    ),
]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTHS = (1280, 390)

#: The smallest text as it is seen, drawings' included, with the scale they are shown at.
SMALLEST = """() => Math.min(...[...document.querySelectorAll('body *')].filter(node =>
    node.checkVisibility({visibilityProperty: true}) && node.getClientRects().length
    && [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim())
    && !['SCRIPT', 'STYLE', 'TITLE', 'OPTION', 'title'].includes(node.tagName)
  ).map(node => parseFloat(getComputedStyle(node).fontSize)
    * (node.ownerSVGElement ? node.getScreenCTM().a : 1)))"""
#: Visible figures: [name, width, height, drawn].
FIGURES = """() => [...document.querySelectorAll('svg, img')].filter(node =>
    node.checkVisibility()).map(node => {
      const box = node.getBoundingClientRect();
      const drawn = node.tagName === 'IMG' ? node.complete && node.naturalWidth > 0
        : node.querySelectorAll('rect, path, circle').length > 0;
      return [node.tagName, box.width, box.height, drawn];
    })"""
#: Texts of drawings that reach beyond the page.
BEYOND = """() => [...document.querySelectorAll('svg text')].filter(node => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility() && (box.left < 0 || box.right > innerWidth);
  }).map(node => node.textContent)"""


@pytest.fixture(scope="module")
def browser():
    assert playwright is not None and CHROMIUM is not None
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(page, bench, tmp_path_factory):
    """The page on disk, with long values that would break a careless layout."""
    setting = page.evaluation.setting
    long = "a prompt that goes on and on, " * 12 + "x" * 120
    conditions = (long, *setting.conditions[1:])
    evaluation = replace(page.evaluation, setting=replace(setting, conditions=conditions))
    path = tmp_path_factory.mktemp("browser") / "report.html"
    name = "out/" + "a-model-with-a-long-name-" * 4
    write_page(make_page(name, page.networks, evaluation, bench=bench), path)
    return path


class Opened:
    """A page in a browser, with all that it said and asked for."""

    def __init__(self, browser, path, width, scheme="light", script=True):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=script,
        )
        self.page = self.context.new_page()
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("requestfailed", lambda request: self.said.append(request.url[:80]))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def loaded(self) -> list[str]:
        """Everything asked for but the page itself and what lies in it."""
        return [u for u in self.requests if u != self.url and not u.startswith("data:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_whole_and_quiet(browser, report, width, scheme):
    with Opened(browser, report, width, scheme) as opened:
        page = opened.page
        assert opened.said == [] and opened.loaded() == []
        figures = page.evaluate(FIGURES)
        drawings = [f for f in figures if f[0] == "svg"]
        assert len(drawings) == 6, figures  # guidance, cost, stages, kept, errors, time
        assert len(figures) - len(drawings) == 6  # two sheets of one guidance, one picture in 4
        for name, wide, tall, drawn in figures:
            assert drawn and wide > 100 * (name == "svg") and tall > 30, (name, wide, tall)
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert page.evaluate(BEYOND) == []
        assert page.evaluate(SMALLEST) >= 11
        ink, paper = (
            page.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("color", "backgroundColor")
        )
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour[4:-1].split(","))


def clip(page) -> str:
    """Return how the visible pruned sheet is clipped."""
    return page.evaluate(
        "getComputedStyle([...document.querySelectorAll('.of-pruned .sheet img')]"
        ".find(n => n.checkVisibility())).clipPath"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_the_slider_moves_by_keys_and_by_pointer(browser, report, width):
    with Opened(browser, report, width) as opened:
        page = opened.page
        page.get_by_label("Slider").check(force=True)
        slider = page.locator(".cut:visible")
        assert clip(page) == "inset(0px 0px 0px 50%)"
        slider.focus()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        assert slider.input_value() == "55" and clip(page) == "inset(0px 0px 0px 55%)"
        page.keyboard.press("Home")
        assert clip(page) in ("inset(0px)", "inset(0px 0px 0px 0%)")
        sheet = page.locator(".of-pruned .sheet:visible")
        sheet.scroll_into_view_if_needed()
        box = sheet.bounding_box()
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.1, y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, y)
        page.mouse.up()
        assert slider.input_value() == "75"
        assert opened.said == []


@pytest.mark.parametrize("width", WIDTHS)
def test_flip_shows_one_model_at_a_time(browser, report, width):
    with Opened(browser, report, width) as opened:
        page = opened.page
        page.get_by_label("Flip").check(force=True)
        dense, pruned = (
            page.locator(".pair:visible .of-dense"),
            page.locator(".pair:visible .of-pruned"),
        )
        assert dense.is_visible() and not pruned.is_visible()
        button = page.locator(".flip:visible")
        button.focus()
        page.keyboard.press("Space")
        assert pruned.is_visible() and not dense.is_visible()
        assert button.get_attribute("aria-pressed") == "true"
        assert button.inner_text() == "Show dense"
        page.keyboard.press("Enter")
        assert dense.is_visible() and not pruned.is_visible()
        page.locator(".of-dense .sheet:visible").click()
        assert pruned.is_visible()
        assert opened.said == []


def test_views_and_guidance_are_reached_by_keys(browser, report):
    with Opened(browser, report, 1280) as opened:
        page = opened.page
        page.locator("input[value=side]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("input[value=slider]").is_checked()
        assert page.locator(".cut:visible").count() == 1
        page.locator("select").focus()
        first = page.locator(".pair:visible .of-dense img").get_attribute("alt")
        page.keyboard.press("ArrowDown")
        second = page.locator(".pair:visible .of-dense img").get_attribute("alt")
        assert first.endswith("guidance 1") and second.endswith("guidance 2")
        order = []
        page.locator("body").click(position={"x": 1, "y": 1})
        for _ in range(60):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        assert any("<select" in one for one in order) and any("summary" in one for one in order)
        assert any('class="scroll"' in one for one in order)


def test_a_picture_is_chosen_by_pointer_and_by_number(browser, report):
    with Opened(browser, report, 1280) as opened:
        page = opened.page
        assert "Picture 1," in page.locator(".which").inner_text()
        sheet = page.locator(".of-dense .sheet:visible")
        box = sheet.bounding_box()
        columns = int(page.locator(".viewer").get_attribute("data-columns"))
        page.mouse.click(box["x"] + box["width"] * 1.5 / columns, box["y"] + 5)
        assert "Picture 2, class 1." in page.locator(".which").inner_text()
        number = page.locator("input[type=number]")
        assert number.input_value() == "2"
        number.focus()
        page.keyboard.press("ArrowUp")
        assert "Picture 3," in page.locator(".which").inner_text()
        crop = page.locator(".crop.pruned img")
        shift = crop.evaluate("node => [node.style.left, node.style.top]")
        assert shift == ["-200%", "0%"]
        assert page.locator(".crop.difference img").count() == 2
        number.fill("999")  # beyond the last: the last
        count = page.locator(".viewer").get_attribute("data-count")
        assert f"Picture {count}," in page.locator(".which").inner_text()
        assert opened.said == []


@pytest.mark.parametrize("width", WIDTHS)
def test_without_scripts_all_pictures_are_there(browser, report, width):
    with Opened(browser, report, width, script=False) as opened:
        page = opened.page
        assert page.locator(".sheet img:visible").count() == 4
        assert page.locator(".controls, .cut, .flip, .chosen").count() > 4
        assert page.locator(".controls:visible, .cut:visible, .flip:visible").count() == 0


def test_values_in_a_page_do_not_run(browser, page, tmp_path):
    evil = "</script><img src=x onerror=document.title='run'><script>document.title='run'</script>"
    setting = page.evaluation.setting
    conditions = (evil,) * len(setting.conditions)
    evaluation = replace(page.evaluation, setting=replace(setting, conditions=conditions))
    write_page(make_page(evil, page.networks, evaluation, command=evil), tmp_path / "a.html")
    with Opened(browser, tmp_path / "a.html", 1280) as opened:
        assert opened.page.title() == f"{evil}: mosaicdiff report"
        assert evil in opened.page.locator(".which").inner_text()
        assert opened.said == [] and opened.loaded() == []


def test_the_policy_stops_what_is_not_its_own(browser, report, tmp_path):
    """The policy is in force: a script and a picture that are put in do nothing."""
    spoilt = report.read_text().replace(
        "</main>",
        "<script>document.title='run'</script><img src='https://example.org/a.png'></main>",
    )
    assert spoilt != report.read_text()
    (tmp_path / "a.html").write_text(spoilt)
    with Opened(browser, tmp_path / "a.html", 1280) as opened:
        assert opened.page.title() != "run"
        assert any("Content Security Policy" in line for line in opened.said)
        assert not [u for u in opened.loaded() if not u.startswith("https://example.org/a.png")]


def test_it_prints(browser, report):
    with Opened(browser, report, 1280, "dark") as opened:
        opened.page.emulate_media(media="print")
        assert opened.page.locator(".controls").is_hidden()
        paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert brightness(paper) == 3 * 255  # light, whatever the screen is
        assert len(opened.page.pdf()) > 20_000
