"""The report as people see it: opened in a headless Chromium, wide and narrow, light and dark.

It needs playwright (of the dev extra) and a browser on this machine, say Debian's package chromium-headless-shell.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hand_made_folders import certificate_of, many_layers, plan_of, record_for, save_folder

from hf_lossless import html_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOSTILE = '<img src="http://example.org/x.png" onerror="document.title=\'taken over\'">'
CONTRAST = 4.5
"""Of text and its background, at least: level AA of the Web Content Accessibility Guidelines 2.2, 1.4.3."""

# The luminance of the colour of every text, and of the nearest background behind it that is not transparent.
READ_COLOURS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, box = text.parentElement;
    if (!text.data.trim() || ["SCRIPT", "STYLE"].includes(box.tagName)) continue;
    let behind = box;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const back = behind ? getComputedStyle(behind).backgroundColor : "none";
    found.push([text.data.trim().slice(0, 40), getComputedStyle(box).color, back]);
  }
  return found;
}"""


@dataclass
class Seen:
    """An open page, and what happened while it opened."""

    page: "sync_api.Page"
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


Open = Callable[..., Seen]


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])  # root has no sandbox
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: "sync_api.Browser") -> Iterator[Open]:
    """Opens an HTML file in a window of its own, and listens to it."""
    contexts = []

    def open_page(file: Path, width: int = 1280, scheme: str = "light") -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("console", lambda message: seen.messages.append(message.text))
        seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("requestfailed", lambda request: seen.failures.append(request.failure))
        seen.page.goto(file.as_uri(), wait_until="load")
        return seen

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a certified model with layers of every kind, quantised inputs, all pictures, and hostile names."""
    layers = many_layers(48)
    layers[HOSTILE] = layers["model.encoder.layer.0.attention.self.query"]
    plan = plan_of(layers, original_bytes=10**6)
    folder = save_folder(
        tmp_path_factory.mktemp("report") / "small",
        plan,
        certificate=certificate_of(),
        record=record_for(plan, bound=((1000, 0.5), (9000, 0.0))),
        architectures=[HOSTILE],
    )
    (folder / "report.html").write_text(html_report(folder), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def bare_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a folder without certificate and without compression.json."""
    folder = save_folder(tmp_path_factory.mktemp("report") / "bare", plan_of())
    (folder / "report.html").write_text(html_report(folder), encoding="utf-8")
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["report", "bare_report"])
def test_it_opens_whole_and_alone(name: str, width: int, open_page: Open, request: pytest.FixtureRequest) -> None:
    seen = open_page(request.getfixturevalue(name), width)
    assert seen.messages == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [seen.page.url]
    images = seen.page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.width])")
    assert len(images) == (3 if name == "report" else 1)
    assert all(complete and natural > 0 and shown > 300 for complete, natural, shown in images)
    inner, outer = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert inner == outer == width  # nothing overflows to the side
    assert seen.page.title().endswith("times smaller")
    for heading in ("Pictures", "Layers", "What was not checked", "Where it comes from"):
        assert seen.page.get_by_role("heading", name=heading, exact=True).is_visible()
    for picture in seen.page.locator("img").all():
        assert picture.is_visible()


def test_names_are_text(report: Path, open_page: Open) -> None:
    seen = open_page(report)
    assert seen.page.get_by_role("rowheader", name=HOSTILE).is_visible()
    assert "taken over" not in seen.page.title()
    assert seen.page.locator("img").count() == 3


def test_no_other_script_would_run(report: Path, tmp_path: Path, open_page: Open) -> None:
    """Should a text ever get through unescaped, the page's policy stops it."""
    broken = tmp_path / "broken.html"
    intruder = f"<script>document.title='taken over'</script>{HOSTILE}"
    broken.write_text(report.read_text(encoding="utf-8").replace("<main>", f"<main>{intruder}"), encoding="utf-8")
    seen = open_page(broken)
    assert seen.page.title() != "taken over" and seen.page.title().endswith("times smaller")
    assert len(seen.messages) >= 2 and all("Content Security Policy" in message for message in seen.messages)
    assert set(seen.failures) == {"csp"}  # the image was stopped by the policy before it left


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme: str, report: Path, open_page: Open) -> None:
    seen = open_page(report, scheme=scheme)
    colours = seen.page.evaluate(READ_COLOURS)
    assert len(colours) > 300
    for text, front, back in colours:
        assert contrast(front, back) >= CONTRAST, (text, front, back)
    body = luminance(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert body > 0.9 if scheme == "light" else body < 0.05
    backs = seen.page.evaluate("[...document.images].map(image => getComputedStyle(image).backgroundColor)")
    assert set(backs) == {"rgb(255, 255, 255)"}  # dark lines on white, whatever the page is


def test_a_heading_sorts_the_table(report: Path, open_page: Open) -> None:
    page = open_page(report).page

    def column(place: int) -> list[str]:
        return page.locator(f"#layers tbody tr > :nth-child({place})").all_inner_texts()

    headings = page.locator("#layers thead th").all_inner_texts()
    place = headings.index("bytes") + 1
    before = column(1)
    assert before == [str(number) for number in range(1, 50)]
    button = page.locator("#layers thead").get_by_role("button", name="bytes")
    button.click()
    sizes = [int(text.replace(",", "")) for text in column(place)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    button.click()
    assert column(place) == [f"{size:,}" for size in sorted(sizes, reverse=True)]
    marked = page.locator("#layers th[aria-sort]")
    assert (marked.count(), marked.get_attribute("aria-sort"), marked.inner_text()) == (1, "descending", "bytes")
    page.locator("#layers thead").get_by_role("button", name="#").click()
    assert column(1) == before


def test_a_keyboard_reaches_what_scrolls(report: Path, open_page: Open) -> None:
    page = open_page(report, 390).page
    scrolling = page.evaluate(
        "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.tabIndex)"
    )
    assert scrolling and set(scrolling) == {0}


def luminance(colour: str) -> float:
    """Relative luminance of a colour in the form rgb(r, g, b), as WCAG 2.2 defines it."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert match, colour
    shares = [int(part) / 255 for part in match.groups()]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(front: str, back: str) -> float:
    darker, lighter = sorted((luminance(front), luminance(back)))
    return (lighter + 0.05) / (darker + 0.05)
