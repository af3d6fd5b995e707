"""In JupyterLab, in a real browser: the EDA notebook opens and runs, a widget is moved, a table is sorted, a row clicked, and what is shown changes."""
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install esci_nb[browser]")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
WAIT_MS = 90_000


@pytest.fixture(scope="module")
def lab(tiny_files, tmp_path_factory):
    "The address of a JupyterLab over a folder with a copy of the EDA notebook, whose source is the tiny files."
    folder = tmp_path_factory.mktemp("lab")
    text = (ROOT / "nbs" / "pipeline" / "eda.ipynb").read_text()
    assert 'source: str = \\"sample\\"' in text
    (folder / "eda.ipynb").write_text(text.replace('source: str = \\"sample\\"', f'source: str = \\"{tiny_files}\\"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.root_dir": folder, "IdentityProvider.token": "", "ServerApp.allow_root": True,
                "ServerApp.open_browser": False, "LabApp.news_url": "", "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    home = {f"JUPYTER_{kind}_DIR": str(folder / ".jupyter" / kind) for kind in ("CONFIG", "RUNTIME")} | {"PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in settings.items())], cwd=folder,
                                  env=os.environ | home, stdout=log, stderr=log)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"{address}/lab/tree/eda.ipynb?reset"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    "JupyterLab with the notebook open."
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        page.set_default_timeout(WAIT_MS)
        page.goto(lab)
        page.locator(".jp-CodeCell").first.wait_for()
        page.get_by_text("| Idle").wait_for()              # cells that are run before the kernel is there are not run
        yield page
        browser.close()


def run_cell(page, text: str):
    "Run the code cell that holds `text`, wait for its end, and return it."
    cell = page.locator(".jp-CodeCell", has_text=text).first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    sync_api.expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=WAIT_MS)
    wrong = cell.locator("[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type*='error']")
    assert not wrong.count(), wrong.all_inner_texts()
    return cell


def picture(image) -> bytes:
    "What the image shows, once it is loaded."
    image.wait_for()
    image.evaluate("image => image.decode()")
    return image.screenshot()


def wait_for_another(image, before: bytes) -> None:
    "Wait until the image shows something else."
    deadline = time.monotonic() + WAIT_MS / 1000
    while picture(image) == before:
        assert time.monotonic() < deadline, "the picture did not change"
        time.sleep(0.1)


def test_widgets_move_the_pictures(page):
    run_cell(page, "source: str =")
    for text in ("from esci_nb.look", "takeaways = Takeaways()", "data = open_eda(source)"):
        run_cell(page, text)
    run_cell(page, "lengths = texts.token_lengths")
    slider = run_cell(page, "slider = LengthSlider(lengths)")
    image = slider.locator("img.widget-image")
    before = picture(image)
    slider.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    wait_for_another(image, before)
    sync_api.expect(slider.locator(".widget-readout")).to_have_text("136")

    explorer = run_cell(page, "explorer = Explorer(data, predictions)")
    image = explorer.locator("img.widget-image")
    before = picture(image)
    explorer.locator("select").first.select_option("jp")
    wait_for_another(image, before)
    cards = explorer.locator(".widget-html-content").last
    sync_api.expect(cards).to_contain_text("· jp ·")
    first = cards.inner_text()
    explorer.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(cards).to_contain_text("2 of")
    assert cards.inner_text() != first


def test_table_is_sorted_and_its_rows_show_cards(page):
    for text in ("source: str =", "from esci_nb.look", "takeaways = Takeaways()", "data = open_eda(source)"):
        run_cell(page, text)
    run_cell(page, "labels.plot_labels(data)")
    sync_api.expect(page.locator(".jp-CodeCell", has_text="takeaways = Takeaways()").first).to_contain_text("is the most frequent label")

    cell = run_cell(page, "lists = query_list(")
    rows, cards = cell.locator("tbody tr:visible"), cell.locator(".cards")
    cell.locator("table.dataTable").first.wait_for()

    def column(name: str) -> list[str]:
        "What stands in a column of the table."
        heads = [head.split("\n")[0].strip() for head in cell.locator("thead th:visible").all_inner_texts()]
        return [row.locator("td").nth(heads.index(name)).inner_text() for row in rows.all()]

    head = cell.locator("thead th:visible", has_text="depth").first
    for down in (False, True):
        head.click()
        page.wait_for_timeout(300)
        depths = list(map(int, column("depth")))
        assert depths == sorted(depths, reverse=down) and len(depths) > 1
    rows.nth(1).click()
    sync_api.expect(cards).to_contain_text(f"query {column('query_id')[1]} ·")

    wanted = column("query_id")[-1]
    cell.locator("input[type=search]").press_sequentially(wanted)
    sync_api.expect(cards).to_contain_text(f"query {wanted} ·")
    cell.locator("input[type=search]").fill("jp")
    page.wait_for_timeout(600)
    assert set(column("locale")) == {"jp"}, "typing filters"
    sync_api.expect(cards).to_contain_text(f"query {column('query_id')[0]} ·")
