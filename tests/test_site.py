"""The built site in a real browser: no errors, no failed requests, nothing cut off from a phone to a wide screen, search, copy buttons and formulas at work.

SITE=FOLDER takes a site that is built."""
import functools
import http.server
import os
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

BROWSER = os.environ.get("CHROMIUM") or next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
MISSING = ["the extra docs"] * (not find_spec("furo")) + ["the extra browser"] * (not find_spec("playwright")) + ["Chromium"] * (not BROWSER)
WHY = f"not installed: {', '.join(MISSING)}" if MISSING else "a minute long" if "CHECK_DOCS" not in os.environ else ""
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"{WHY} (make check-docs)")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    from esci_nb.cli import make_parser
    from esci_nb.docs import build_docs
    if built := os.environ.get("SITE"):
        return Path(built)
    folder = tmp_path_factory.mktemp("built") / "site"
    pages, links = build_docs(folder, make_parser())
    assert pages > 70 and links > 10_000
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    "A page in a narrow window; what goes wrong in it is in `page.wrong`."
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda request: None if "ABORTED" in request.failure else page.wrong.append(f"{request.failure}: {request.url}"))  # left
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else page.wrong.append(f"from elsewhere: {request.url}"))
    page.on("response", lambda response: page.wrong.append(f"{response.status}: {response.url}") if response.status >= 400 else None)
    yield page
    context.close()


CUT = """width => [...document.querySelectorAll('article :is(table, pre, img, mjx-container, .admonition)')].filter(part => {
    if (part.getBoundingClientRect().right <= width + 1 || !part.checkVisibility()) return false;
    for (let above = part; above.tagName != 'ARTICLE'; above = above.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(above).overflowX) && above.getBoundingClientRect().right <= width + 1) return false;
    return true;
}).map(part => `${part.tagName} ${part.innerText?.slice(0, 40)}`)"""  # what reaches past the window and cannot be scrolled to


def test_every_page_at_three_widths_in_light_and_dark(site, address, page):
    wrong = []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="load")
        for width, scheme in ((390, "dark"), (768, "light"), (1440, "dark"), (1440, "light"), (768, "dark"), (390, "light")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            wide, cut = page.evaluate("document.documentElement.scrollWidth"), page.evaluate(CUT, width)
            wrong += [f"{name} at {width}, {scheme}: {wide} px wide, cut off: {cut[:3]}"] * (wide > width or bool(cut))
        wrong += [f"{name}: {line}" for line in page.wrong]
        page.wrong.clear()
    assert not wrong, "\n".join(wrong)


def test_code_of_95_characters_fits_a_wide_screen(address, page):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/030_metrics.html")
    assert page.evaluate("""() => {
        const pre = [...document.querySelectorAll('div.highlight:not(.cell_output *) pre')].find(one => one.clientWidth), one = document.createElement('span');
        one.textContent = 'x'.repeat(95);
        one.style.whiteSpace = 'pre';
        pre.append(one);
        return one.getBoundingClientRect().width + 2 * parseFloat(getComputedStyle(pre).paddingLeft) <= pre.clientWidth;
    }""")


def test_a_copy_button_copies_the_code_and_output_has_none(address, browser):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{address}/index.html")
    block = page.locator("div.highlight", has_text="make demo").first
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("pre").inner_text().strip() != ""
    page.goto(f"{address}/030_metrics.html")
    assert page.locator("button.copybtn").count() > 10 and page.locator(".cell_output button.copybtn").count() == 0
    context.close()


def test_a_formula_is_drawn(address, page):
    page.goto(f"{address}/030_metrics.html")
    page.wait_for_selector("mjx-container svg path, mjx-container svg use", state="attached", timeout=20_000)
    assert page.locator("mjx-container").count() > 5 and page.locator("mjx-merror, [data-mjx-error]").count() == 0 and not page.wrong


def test_search_finds_ndcg(address, page):
    page.goto(f"{address}/search.html?q=NDCG")
    page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
    found = page.locator("#search-results ul.search li a").all_inner_texts()
    assert any("ndcg" in text.lower() for text in found) and "Metrics" in found, found[:10]
    page.locator("#search-results ul.search li a", has_text="Metrics").first.click()
    assert "030_metrics" in page.url and not page.wrong


def test_source_unfolds_and_symbols_link(address, page):
    page.goto(f"{address}/030_metrics.html")
    source = page.locator("details.hide").first
    source.locator("summary").click()
    assert source.locator("pre").is_visible()
    page.goto(f"{address}/reference.html")
    page.locator("a", has_text="paired_bootstrap").first.click()
    assert page.url.endswith("030_metrics.html#esci_nb.metrics.paired_bootstrap") and not page.wrong


def test_dark_and_light_differ(address, page):
    page.goto(f"{address}/index.html")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert dark != page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_figures_have_pixels_to_spare(site, address, browser):
    "On a screen with two pixels to the point, no figure of a chapter is stretched."
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    blurred = []
    for path in sorted(site.glob("[0-9]*.html")):
        page.goto(f"{address}/{path.name}")
        blurred += page.evaluate("""name => [...document.querySelectorAll('.cell_output img')].filter(image => !/[.]svg$|^data:image.svg/.test(image.src) &&
            image.naturalWidth < 1.25 * image.clientWidth).map(image => `${name}: ${image.naturalWidth} px shown at ${image.clientWidth}`)""", path.name)
    page.close()
    assert not blurred, blurred
