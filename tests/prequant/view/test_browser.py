"""The page in a browser: opening, choosing, searching, stepping, colouring; and how much a deep model makes it do.

The browser is Chromium with its driver. Where there is none, these tests are skipped, unless
PREQUANT_REQUIRE_BROWSER=1 asks for it.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from prequant.view import Record, write_page

from .records import HOSTILE, bert_record, deep_record, hostile_record

REQUIRED = os.environ.get("PREQUANT_REQUIRE_BROWSER") == "1"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900")
LAYER = "m:bert.encoder.layer.1"
QUERY = "m:bert.encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        assert not REQUIRED, "PREQUANT_REQUIRE_BROWSER=1, and chromium or chromedriver is not installed"
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


class Page:
    """A page in the browser, and what a reader does with it."""

    def __init__(self, browser: webdriver.Chrome, record: Record, folder: Path) -> None:
        self.browser = browser
        browser.get(write_page(record, folder / "graph.html").as_uri())

    def boxes(self) -> list[str]:
        return [str(box.get_dom_attribute("data-id")) for box in self.all(".box")]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def box(self, id: str) -> WebElement:
        return self.one(f'.box[data-id="{id}"]')

    def open(self, id: str) -> None:
        self.box(id).send_keys(Keys.ENTER)

    def keys(self, *keys: str) -> None:
        self.one("body").send_keys(*keys)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    @property
    def panel(self) -> str:
        return self.one("#panel").text

    @property
    def stage(self) -> str:
        (chosen,) = self.all('#stages [aria-selected="true"]')
        return chosen.text.splitlines()[0]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def complaints(self) -> list[Any]:
        return [entry for entry in self.browser.get_log("browser") if "favicon" not in entry["message"]]


@pytest.fixture
def bert(chromium: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    shown = Page(chromium, bert_record(), tmp_path)
    yield shown
    assert shown.complaints() == []


def test_the_first_sight_is_the_blocks_with_their_weights(bert: Page) -> None:
    shown = bert.boxes()
    assert {"m:bert", "m:bert.encoder", "m:bert.embeddings", LAYER, "n:input_ids", "n:output"} <= set(shown)
    assert len(bert.all(f'.box[data-id="{LAYER}"] .cell')) == 6  # query, key, value, output; up and down
    totals = bert.one("#totals").text
    assert "× smaller" in totals and "bits each" in totals and "a batch" in totals
    first, *steps = bert.texts("#stages button")
    assert first == "as traced\n17 weights" and bert.stage == "lower"
    for text, stage in zip(steps, bert_record().stages[1:], strict=True):
        counts = {"+": len(stage.added), "−": len(stage.removed), "~": len(stage.rewritten)}
        assert text.split() == [stage.title, *(f"{sign}{count}" for sign, count in counts.items() if count)]


def test_a_block_opens_into_its_parts_and_closes_again(bert: Page) -> None:
    before = bert.boxes()
    bert.box(LAYER).click()
    opened = set(bert.boxes()) - set(before)
    assert f"{LAYER}.attention" in opened and bert.box(LAYER).get_dom_attribute("aria-expanded") == "true"
    bert.open(f"{LAYER}.attention")
    bert.open(f"{LAYER}.attention.self")
    assert QUERY in bert.boxes()
    bert.open(LAYER)
    assert bert.boxes() == before


def test_a_node_shows_its_figures(bert: Page) -> None:
    record = bert_record()
    name = "bert.encoder.layer.1.output.dense.weight"
    (weight,) = (record.weights[place] for place in record.stages[-1].weights if record.weights[place].name == name)
    (node,) = (record.nodes[place] for place in record.stages[-1].nodes if name in record.nodes[place].uses)
    bert.run("reveal(arguments[0])", f"n:{node.name}")
    assert bert.one("#panel h2").text == node.name
    assert node.shape in bert.panel and node.text in bert.panel
    assert "affine4:row, packed" in bert.panel and f"{weight.sqnr:.1f} dB" in bert.panel
    assert f"{weight.outliers} (" in bert.panel and f"{weight.bits:.2f}" in bert.panel
    assert f"{record.stages[-1].errors[node.name]:.1f} dB" in bert.panel
    assert len(bert.all(".chart .level")) == len(weight.levels) == 16
    histogram = weight.histogram
    assert histogram is not None and histogram.outliers is not None
    assert len(bert.all(".chart .outlier")) == sum(count > 0 for count in histogram.outliers) > 0
    assert len(bert.all(".chart .before")) == 1


def test_a_cell_of_a_closed_block_shows_its_weight(bert: Page) -> None:
    bert.all(f'.box[data-id="{LAYER}"] .cell')[0].click()
    assert "bert.encoder.layer.1.attention.self.query.weight" in bert.panel
    assert bert.box(LAYER).get_dom_attribute("aria-expanded") == "false"


def test_search_finds_a_node_and_goes_to_it(bert: Page) -> None:
    bert.keys("/")
    assert bert.browser.switch_to.active_element.get_dom_attribute("id") == "search"
    bert.one("#search").send_keys("layer.0 key packed")
    found = bert.texts("#found li")
    assert len(found) == 1 and "bert.encoder.layer.0.attention.self.key.weight" in found[0]
    bert.one("#search").send_keys(Keys.ENTER)
    assert "bert.encoder.layer.0.attention.self.key.weight" in bert.panel
    (chosen,) = bert.all(".box.selected")
    place, canvas = chosen.rect, bert.one("#drawing").rect
    assert canvas["x"] < place["x"] < canvas["x"] + canvas["width"]
    assert canvas["y"] < place["y"] < canvas["y"] + canvas["height"]
    bert.keys("/")
    bert.one("#search").clear()
    bert.one("#search").send_keys("no such thing")
    assert bert.texts("#found li") == ["nothing of that name at this stage"]


def test_arrows_step_through_the_passes_and_show_what_they_changed(bert: Page) -> None:
    bert.open(LAYER)
    bert.open(f"{LAYER}.intermediate")
    dense = f"{LAYER}.intermediate.dense"
    bert.open(dense)
    packed = {id for id in bert.boxes() if "packed_linear" in id}
    (rewritten,) = (box for box in bert.all(".op.rewritten") if box.get_dom_attribute("data-id") in packed)
    assert rewritten.is_displayed() and len(bert.all(".op.removed")) == 2
    bert.one("#removed").click()
    assert bert.all(".op.removed") == []
    bert.one("#removed").click()
    bert.keys(Keys.ARROW_LEFT)
    assert bert.stage == "quantize-weights"
    assert bert.texts(".op.added .label") == ["dequantize"] and bert.texts(".op.rewritten .label") == ["add_outliers"]
    bert.keys(Keys.ARROW_LEFT)
    assert bert.stage == "split-outliers"
    assert bert.texts(".op.added .label") == ["add_outliers"] and bert.texts(".op.rewritten .label") == ["linear"]
    bert.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert bert.stage == "as traced" and bert.all(".added, .removed, .rewritten") == bert.all(".marks span")
    bert.all("#stages button")[-1].click()
    assert bert.stage == "lower"


def test_colourings_change_the_colours_and_the_legend(bert: Page) -> None:
    cell = f'.box[data-id="{LAYER}"] .cell'
    seen, legends = [], []
    for name in ("bits", "weights", "values", "bytes", "time"):
        bert.one(f'#colourings input[value="{name}"]').find_element(By.XPATH, "..").click()
        seen.append(bert.one(cell).value_of_css_property("fill"))
        legends.append(bert.one("#legend").text)
        assert len(bert.all("#legend span")) >= 5
    assert len(set(legends)) == 5 and len(set(seen)) >= 3


def test_what_is_unknown_can_not_be_coloured_by(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(chromium, deep_record(), tmp_path)
    disabled = [box.get_dom_attribute("value") for box in page.all("#colourings input") if not box.is_enabled()]
    assert disabled == ["values", "time"]
    assert "Nothing was measured on a batch" in page.panel
    assert page.complaints() == []


def test_a_deep_model_draws_only_what_is_open(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(chromium, deep_record(), tmp_path)
    elements = "return document.getElementById('scene').querySelectorAll('*').length"
    closed = page.run(elements)
    nodes = len(deep_record().stages[-1].nodes)
    layers = [id for id in page.boxes() if id.startswith("m:transformer.h.")]
    assert len(layers) == 24 and len(page.boxes()) < 40 < nodes / 15
    assert closed < 40 * 24
    # Opening a layer lays out that layer and the frames around it: what it adds does not hang on the others.
    count = """
        const layout = dagre.layout;
        let boxes = 0;
        dagre.layout = (graph) => { boxes += graph.nodes().length; layout(graph); };
        activate(arguments[0]);
        dagre.layout = layout;
        return boxes;
    """
    laid_out = page.run(count, layers[12])
    one = page.run(elements) - closed
    assert laid_out < 60 and one < 250
    page.run("activate(arguments[0])", layers[3])
    assert page.run(elements) - closed <= 2 * one
    page.run("activate(arguments[0]); activate(arguments[1])", layers[3], layers[12])
    assert page.run(elements) == closed
    assert page.complaints() == []


def test_names_from_models_are_shown_as_they_are(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(chromium, hostile_record(), tmp_path)
    assert page.one("h1").text == HOSTILE
    for box in page.boxes():
        page.run("reveal(arguments[0])", box)
        page.run("itemOf(arguments[0]).children && activate(arguments[0])", box)
    assert HOSTILE in page.panel or HOSTILE in page.one("#scene").text
    page.keys("/")
    page.one("#search").send_keys("onerror")
    assert page.texts("#found li")
    assert page.all("img") == [] and page.all("#panel script, #scene script") == []
    assert page.complaints() == []  # nor an alert, which would have stopped the driver


def test_the_policy_stops_a_script_that_gets_in_all_the_same(bert: Page) -> None:
    bert.run(
        "const script = document.createElement('script'); script.textContent = 'window.got_in = true';"
        "document.body.append(script)"
    )
    assert bert.run("return window.got_in") is None
    (complaint,) = bert.complaints()
    assert "Content Security Policy" in complaint["message"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(scheme: str, chromium: webdriver.Chrome, tmp_path: Path) -> None:
    """By WCAG's ratio, 4.5 or more."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(chromium, bert_record(), tmp_path)
    colours = page.run(
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(arguments[0].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]))",
        ["ground", "surface", "raised", "ink", "soft-ink", "accent", "on-accent", "added", "removed", "rewritten"],
    )
    for ink in ("ink", "soft-ink", "accent", "added", "removed", "rewritten"):
        assert contrast(colours[ink], colours["surface"]) >= 4.5, ink
    for ground in ("ground", "raised"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
        assert contrast(colours["soft-ink"], colours[ground]) >= 4.5
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    scales = page.run("return [VIRIDIS, CIVIDIS, RED_TO_BLUE, [EXACT]].flat().map((colour) => [colour, inkOn(colour)])")
    assert min(contrast(colour, ink) for colour, ink in scales) >= 4.5


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
