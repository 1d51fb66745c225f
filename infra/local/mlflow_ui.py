"""MLflow's pages in a real browser: what they show, read from the page itself.

Every selector stands here; they were found in MLflow 3.17, which pyproject.toml pins for that.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from playwright.sync_api import Locator, Page, StorageState, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH_PX, HEIGHT_PX = 1440, 900
TIMEOUT_S = 30
# A fresh browser opens MLflow for GenAI, with the assistant's panel over the page.
REMEMBERED = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.panelOpen_v1": False,
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
}
ASSISTANT = "[data-assistant-ui]"
RUN_ROW = ".ag-center-cols-container [role=row]"
CHART_SEARCH = "Search metric charts"
CARD = "experiment-view-compare-runs-card"
CARD_CORNER = "draggable-card-resize-handle"
PLOT = ".js-plotly-plot"
DRAWN = ".scatterlayer path.js-line, .barlayer path"
TREE_ROOT = "xpath=//ul[./li/div[1]//*[@data-testid='artifact-tree-node']]"
TREE_NODE = "xpath=./li/div[1]//*[@data-testid='artifact-tree-node' and @artifact-name={name}]"
TREE_BELOW = "xpath=./li[./div[1]//*[@artifact-name={name}]]/div[2]/ul"
FACT, FACT_LABEL, FACT_VALUE = "descriptions-item", "descriptions-item-label", "descriptions-item-content"


@dataclass(frozen=True)
class Curve:
    """The points that a chart draws."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class SliderImage:
    """What an image slider shows."""

    step: int
    """Where the slider stands."""
    path: str
    """The artifact that the picture was loaded from."""
    width_px: int
    """Of the picture as loaded; one that did not load has none."""


@dataclass(frozen=True)
class ModelVersion:
    """What the head of a version's page says."""

    name: str
    version: str
    aliases: list[str]


def browser_path() -> str | None:
    """The system's chromium; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browsed(uri: str, *, timeout_s: float = TIMEOUT_S) -> Iterator["MlflowPages"]:
    """The pages of the server at `uri` in a browser of their own, which ends with the context."""
    address = urlsplit(uri)
    remembered: StorageState = {
        "origins": [
            {
                "origin": f"{address.scheme}://{address.netloc}",
                "localStorage": [{"name": key, "value": json.dumps(REMEMBERED[key])} for key in REMEMBERED],
            }
        ]
    }
    with sync_playwright() as playwright:
        # Chromium refuses to run as root with its sandbox, as in CI; the only pages are the server's.
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": WIDTH_PX, "height": HEIGHT_PX},
            storage_state=remembered,
        )
        context.set_default_timeout(timeout_s * 1000)
        try:
            yield MlflowPages(context.new_page(), uri.rstrip("/"))
        finally:
            browser.close()


class MlflowPages:
    """One tab; each method opens a page and returns when what was asked for is drawn.

    What does not appear in time is playwright's TimeoutError, which names the selector.
    """

    def __init__(self, page: Page, uri: str) -> None:
        self.page, self._uri = page, uri

    def open_runs(self, experiment_id: str, *, run_name: str) -> str:
        """The list of runs; the address behind the run's name."""
        self._open(f"experiments/{experiment_id}/runs")
        return self.page.get_by_role("link", name=run_name, exact=True).get_attribute("href") or ""

    def open_run(self, experiment_id: str, run_id: str, *, run_name: str) -> None:
        """The overview."""
        self._open(f"experiments/{experiment_id}/runs/{run_id}")
        self.page.get_by_role("heading", name=run_name).wait_for()
        self.parameters.wait_for()

    @property
    def parameters(self) -> Locator:
        """The heading below the metrics, on the overview."""
        return self.page.get_by_text("Parameters (")

    def open_charts(self, experiment_id: str, run_id: str, *, pattern: str) -> None:
        """The page of charts with those whose full name matches the regular expression."""
        self._open(f"experiments/{experiment_id}/runs/{run_id}/model-metrics")
        self.page.get_by_placeholder(CHART_SEARCH).fill(pattern)

    def curve(self, metric: str) -> Curve:
        """The points in the chart of a metric, on the page of charts."""
        plot = self.card(metric).locator(PLOT)
        plot.locator(DRAWN).first.wait_for(state="attached")
        x, y = plot.evaluate("plot => [Array.from(plot.data[0].x), Array.from(plot.data[0].y)]")
        return Curve(steps=x, values=y)

    def slider_image(self, key: str, *, step: int = 0) -> SliderImage:
        """The picture that a slider shows at a step, on the page of charts."""
        card = self.card(key)
        place = card.get_by_role("spinbutton")
        place.fill(str(step))
        place.press("Tab")  # a step is taken when the field is left
        image = card.locator(f"img[src*='{quote(f'{key}+step+{step}+', safe='')}']")
        width_px = self._loaded(image)
        (path,) = parse_qs(urlsplit(image.get_attribute("src") or "").query)["path"]
        shown = int(card.get_by_role("slider").get_attribute("aria-valuenow") or -1)
        return SliderImage(step=shown, path=path, width_px=width_px)

    def card(self, name: str) -> Locator:
        """The card of a chart or of a slider."""
        return self.page.get_by_test_id(CARD).locator(f"xpath=self::*[.//h4[@title={_quoted(name)}]]")

    def enlarge_card(self, name: str, *, by_px: tuple[int, int]) -> None:
        """Pull the corner of a card that stands in the first row."""
        box = self.card(name).locator("..").get_by_test_id(CARD_CORNER).bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + by_px[0], y + by_px[1], steps=10)
        mouse.up()

    def open_artifact_image(self, experiment_id: str, run_id: str, *, path: str) -> Locator:
        """Click the way to a picture among the artifacts; its preview, loaded."""
        self._open(f"experiments/{experiment_id}/runs/{run_id}/artifacts")
        level = self.page.locator(TREE_ROOT).first
        for part in path.split("/"):
            level.locator(TREE_NODE.format(name=_quoted(part))).click()
            level = level.locator(TREE_BELOW.format(name=_quoted(part)))
        image = self.page.get_by_alt_text(path, exact=True)
        self._loaded(image)
        return image

    def open_model_version(self, name: str, version: str) -> ModelVersion:
        """A version of a registered model."""
        self._open(f"models/{quote(name)}/versions/{version}")
        title = self.page.get_by_role("heading", name="Version ")
        label = self.page.get_by_test_id(FACT_LABEL).get_by_text("Aliases")
        fact = self.page.get_by_test_id(FACT).filter(has=label).get_by_test_id(FACT_VALUE)
        fact.get_by_role("button").wait_for()
        return ModelVersion(
            name=self.page.locator(f"a[href$='/models/{quote(name)}']").first.inner_text(),
            version=title.inner_text().removeprefix("Version "),
            aliases=[one.get_attribute("title") or "" for one in fact.get_by_role("status").all()],
        )

    def _open(self, path: str) -> None:
        self.page.goto("about:blank")  # from one page to another MLflow would keep what is open and searched
        self.page.goto(f"{self._uri}/#/{path}?workflowType=machine_learning")

    def _loaded(self, image: Locator) -> int:
        image.wait_for(state="attached")
        handle = image.element_handle()
        self.page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=handle)
        return image.evaluate("image => image.naturalWidth")


def _quoted(name: str) -> str:
    """A text of an XPath, which knows no escapes."""
    return f"'{name}'" if "'" not in name else f'"{name}"'
