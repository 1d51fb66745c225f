"""Take the README's pictures of MLflow's pages.

python infra/local/screenshots.py --uri http://127.0.0.1:5000 --run_id <id> --output docs/images

What the run does not have is skipped, with a line that says so.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_ui import ASSISTANT, RUN_ROW, WIDTH_PX, MlflowPages, browsed, browser_path
from playwright.sync_api import Locator

CHARTS = ("train/loss", "train/grad_norm", "train/lr", "val/loss")
"""Two rows of the page."""
SLIDER = "samples"
ENLARGED_PX = (300, 300)
"""More than MLflow allows. It prints the run's parameters above the picture, which is then out of view."""
PICTURES = {
    "contact_sheet": r"data/[^/]+/contact_sheet\.png",
    "normalization": r"data/[^/]+/normalization\.png",
    "curves": r"plots/curves\.png",
    "actions": r"plots/actions/.+\.png",
}
LEAST_PX, MOST_PX, MARGIN_PX = 480, 1700, 64
"""Height of a picture: down to what it shows, and a margin."""
TALL_PX = 1800
"""Height of the window before it is known how much of it is needed; charts out of view are not drawn."""
SETTLED_MS = 600
"""Plotly and the panes fade in."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", default="http://127.0.0.1:5000")
    parser.add_argument("--run_id", required=True)
    parser.add_argument("--model", default="", help="a registered model; its newest version is shown")
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    if browser_path() is None:
        sys.exit("no chromium on PATH: run infra/local/chromium.sh")
    client = MlflowClient(flags.uri)
    flags.output.mkdir(parents=True, exist_ok=True)
    with browsed(flags.uri) as pages:
        camera = Camera(pages, flags.output)
        take_run(camera, client, client.get_run(flags.run_id))
        if flags.model:
            take_model(camera, client, flags.model)


class Camera:
    """Takes the page that is open, cut below what it shows."""

    def __init__(self, pages: MlflowPages, output: Path) -> None:
        self.pages, self._output = pages, output
        self.unroll()

    def unroll(self) -> None:
        """Make the window so tall that nothing has to be scrolled to."""
        self._resize(TALL_PX)

    def take(self, name: str, *, lowest: Locator, margin_px: int = MARGIN_PX) -> None:
        """Write a picture that ends so far below `lowest`."""
        page = self.pages.page
        page.wait_for_timeout(SETTLED_MS)
        box = lowest.bounding_box()
        assert box, f"{name}: nothing of it is to be seen"
        bottom = int(box["y"] + box["height"]) + margin_px
        self._resize(min(max(bottom, LEAST_PX), MOST_PX))
        page.wait_for_timeout(SETTLED_MS)
        path = self._output / f"mlflow_{name}.png"
        page.screenshot(path=path, style=f"{ASSISTANT} {{ display: none }}")
        print(path)
        self.unroll()

    def _resize(self, height_px: int) -> None:
        self.pages.page.set_viewport_size({"width": WIDTH_PX, "height": height_px})


def take_run(camera: Camera, client: MlflowClient, run: Run) -> None:
    """The run in the list, and its own pages."""
    pages, name = camera.pages, run.info.run_name or ""
    place = (run.info.experiment_id, run.info.run_id)
    pages.open_runs(run.info.experiment_id, run_name=name)
    camera.take("runs", lowest=pages.page.locator(RUN_ROW).last)
    pages.open_run(*place, run_name=name)
    camera.take("overview", lowest=pages.parameters, margin_px=-24)
    take_charts(camera, run)
    artifacts = sorted(artifact_paths(client, run.info.run_id))
    if any(path.startswith(f"images/{SLIDER}+") for path in artifacts):
        take_slider(camera, run)
    else:
        print(f"skipped: the run has no images {SLIDER!r}")
    for title, pattern in PICTURES.items():
        found = [path for path in artifacts if re.fullmatch(pattern, path)]
        if found:  # of numbered ones the newest
            image = pages.open_artifact_image(*place, path=max(found, key=lambda path: Path(path).name))
            camera.take(title, lowest=image)
        else:
            print(f"skipped: the run has no artifact {pattern.replace(chr(92), '')}")


def take_charts(camera: Camera, run: Run) -> None:
    """Those curves of the choice that the run has."""
    shown = [name for name in CHARTS if name in run.data.metrics]
    for name in CHARTS:
        if name not in shown:
            print(f"skipped: the run has no metric {name}")
    if shown:
        pattern = f"^({'|'.join(shown)})$"
        camera.pages.open_charts(run.info.experiment_id, run.info.run_id, pattern=pattern)
        for name in shown:
            camera.pages.curve(name)
        camera.take("charts", lowest=camera.pages.card(shown[-1]), margin_px=16)


def take_slider(camera: Camera, run: Run) -> None:
    """The first sample, on a card that is large enough to show it."""
    pages = camera.pages
    pages.open_charts(run.info.experiment_id, run.info.run_id, pattern=f"^{SLIDER}$")
    pages.slider_image(SLIDER)
    pages.enlarge_card(SLIDER, by_px=ENLARGED_PX)
    pages.page.wait_for_timeout(SETTLED_MS)
    pages.card(SLIDER).locator("img").evaluate("image => image.scrollIntoView({block: 'center'})")
    camera.take(SLIDER, lowest=pages.card(SLIDER))


def take_model(camera: Camera, client: MlflowClient, name: str) -> None:
    """The newest version of a registered model."""
    found = client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=1)
    if not found:
        print(f"skipped: there is no registered model {name!r}")
        return
    camera.pages.open_model_version(name, str(found[0].version))
    camera.take("model", lowest=camera.pages.page.get_by_role("row").last)


def artifact_paths(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    """All files that the server has of a run."""
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from artifact_paths(client, run_id, entry.path)
        else:
            yield entry.path


if __name__ == "__main__":
    main()
