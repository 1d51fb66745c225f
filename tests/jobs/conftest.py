"""MLflow's pages, for the tests of what a person sees of a job."""

import pytest

from infra.local.mlflow_ui import browsed, browser_path


@pytest.fixture
def pages(services):
    """The session's MLflow in a browser that ends with the test: Ray's driver and it share no event loop."""
    if browser_path() is None:
        pytest.skip("no chromium on PATH; infra/local/chromium.sh installs one or says how")
    with browsed(services["mlflow"]["url"]) as opened:
        yield opened
