"""A headless Chromium, and the real endpoint for it to open."""

import shutil

import pytest
from selenium import webdriver

from tests.support.endpoint import running_endpoint, serve_config

TOKEN = "a-token-of-some-length"


def needed(*names):
    """The path of the first of these programs that is there."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs {names[0]}: apt-get install chromium chromium-driver")
    return found


@pytest.fixture(scope="session")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = needed("chromium", "chromium-browser", "google-chrome")
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(needed("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    """The browser in a tab of its own, without what an earlier test stored. Fails the test that breaks the policy."""
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    driver.get_log("browser")
    yield driver
    complaints = [entry for entry in driver.get_log("browser") if entry["source"] != "network"]
    driver.close()
    driver.switch_to.window(first)
    assert complaints == []


@pytest.fixture(scope="session")
def address():
    """Of the real API over the embedded checkpoint on the torch engine; no token needed."""
    with running_endpoint(serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"})) as address:
        yield address


@pytest.fixture
def guarded_address(tmp_path):
    """Of an endpoint that wants `TOKEN`."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    with running_endpoint(serve_config(auth={"tokens_file": str(tokens)})) as address:
        yield address
