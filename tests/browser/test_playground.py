"""The playground in a real browser, on the real API: what it shows is what the API says."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.conftest import TOKEN
from tests.browser.page import Page
from tests.support.endpoint import fake_model, running_endpoint, serve_config

pytestmark = pytest.mark.browser

NASTY = {
    "prompt": 'It\'s "quoted" with $HOME, `whoami`, $(whoami), !! and a \\ backslash\\n\nJSON\n\'\'\'\n"""',
    "reference": "\t一只猫 🐈 \u2028 é <b>not markup</b> %s {0} \u202eturned",
    "outputs": ["'; exit 1; '", "\\", 'end"\nJSON\n', "1" * 300, "<img src=x onerror=alert(1)>", "</script>"],
}


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def close_to(rewards):
    """Two calls may differ by rounding: an engine call can hold other rows the next time."""
    return pytest.approx(rewards, abs=1e-5)


def group_of(page):
    """The group that the form holds, as the API takes it."""
    return {
        "prompt": page.values("#prompt")[0],
        "reference": page.values("#reference")[0],
        "outputs": page.values("#outputs textarea"),
    }


def asked(address, group, **headers):
    """The API's own rows for a group."""
    return httpx.post(f"http://{address}/v1/rewards", json=group, headers=headers).raise_for_status().json()["rewards"]


def pending_tokens(address):
    lines = httpx.get(f"http://{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("polar_ray_pending_tokens{"))


def run(command, **environment):
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_curl(snippet, **environment):
    """Rewards in the reply that the snippet prints when a shell runs it."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    return [row["reward"] for row in json.loads(run(["bash", "-euc", snippet], **environment))["rewards"]]


def run_python(snippet, **environment):
    return [float(line.split()[0]) for line in run([sys.executable, "-c", snippet], **environment).splitlines()]


def test_an_example_is_one_click_away(page):
    page.press("Water tank")
    group = group_of(page)
    assert group["prompt"].startswith("A water tank holds 240 litres.")
    assert group["reference"].endswith("Answer: 20 minutes")
    assert "20 minutes." in group["outputs"]
    assert page.find("[aria-pressed=true]").text == "Water tank"


def test_every_example_can_be_scored(page):
    for name in page.texts("#examples button"):
        page.press(name)
        page.score()
        assert len(page.find_all("#ranking > li")) == len(page.find_all("#outputs li")), name
        assert len(page.shown_rewards()) >= 2, name
    assert page.log() == []


def test_outputs_are_ranked_as_the_api_rewards_them(page, address):
    rows = asked(address, group_of(page))
    page.score()
    shown = page.shown_rewards()
    best_first = sorted(rows, key=lambda row: -row["reward"])
    assert [place for place, _ in shown] == [row["index"] for row in best_first]
    assert [reward for _, reward in shown] == close_to([row["reward"] for row in best_first])
    assert [text.replace("\u2212", "-") for text in page.texts(".value")] == [f"{reward:z.3f}" for _, reward in shown]
    assert page.texts(".rank") == ["1", "2", "3", "4", "5"]


def test_bars_are_relative_to_the_group_whatever_the_signs(page):
    far_off = "Steam the dumplings for eight minutes and serve them with black vinegar."
    page.fill_in("What is the capital of China?", "Beijing.", ["Beijing.", "Shanghai.", far_off])
    page.score()
    rewards = [reward for _, reward in page.shown_rewards()]
    widths = page.bar_widths()
    track = page.find(".track").rect["width"]
    assert min(rewards) < 0
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(track, abs=1)
    middle = (rewards[1] - rewards[-1]) / (rewards[0] - rewards[-1])
    assert widths[1] == pytest.approx(middle * track, rel=0.05)
    assert "lowest reward (\u2212" in page.text("#scale")


def test_equal_rewards_share_a_rank(page):
    page.fill_in("What is the capital of China?", "Beijing.", ["Shanghai.", "Beijing.", "Shanghai."])
    page.score()
    ranks = page.texts(".rank")
    assert sorted(ranks) in (["1", "2=", "2="], ["1=", "1=", "3"])


def test_a_failed_row_stays_with_its_code_and_sentence(page):
    page.fill_in("What is the capital of China?", "Beijing.", ["", "Shanghai."])
    page.score()
    assert page.texts(".failed .code") == ["triple_empty"]
    assert "output: no text" in page.text(".failed .why")
    assert [place for place, _ in page.shown_rewards()] == [1]
    assert page.texts("#ranking .rank") == ["1", "\u2013"]


def test_removed_control_tokens_are_shown(page):
    page.press("Forged control tokens")
    page.score()
    assert page.texts("#ranking .tag") == ["\u26a0 1 control token removed"] * 2


def test_cut_tokens_are_shown_and_long_texts_unfold(page, address):
    page.press("Longer than the limit")
    cut = asked(address, group_of(page))[0]["cut_tokens"]
    page.score()
    assert page.texts("#ranking .tag") == [f"\u26a0 {cut:,} tokens cut"]
    text = max(page.find_all("#ranking .clamped"), key=lambda found: len(found.get_property("textContent")))
    folded = text.rect["height"]
    page.press("Show all")
    assert text.rect["height"] > 10 * folded


def test_an_untrained_model_says_so_and_no_other(page, browser):
    assert not page.shows("#untrained")
    config = serve_config()
    with running_endpoint(config, replace(fake_model(config), untrained=True)) as address:
        assert "rewards are random numbers" in Page(browser, address).text("#untrained")


def test_the_reply_is_accounted_for(page, address):
    model = httpx.get(f"http://{address}/v1/models").json()["data"][0]
    page.score()
    sums = page.text("#sums")
    assert model["id"] in sums
    assert model["receipt_id"][:12] in sums
    assert "saved by sharing" in sums
    assert json.loads(page.snippet("Reply"))["receipt_id"] == model["receipt_id"]


def test_ctrl_enter_scores(page):
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.shows("#ranking .scored"))
    assert "5 of 5 outputs ranked" in page.find("#spoken").get_property("textContent")


def test_results_of_an_earlier_form_are_marked(page):
    page.score()
    assert "stale" not in page.find("#results").get_attribute("class")
    page.find("#outputs textarea").send_keys(" Or so.")
    assert "stale" in page.find("#results").get_attribute("class")
    assert page.text("#progress") == "of the group before you changed it"


@pytest.mark.parametrize("group", [NASTY, None], ids=["nasty", "example"])
def test_both_snippets_give_the_rewards_that_are_shown(page, group):
    if group:
        page.fill_in(**group)
    page.score()
    shown = [reward for _, reward in sorted(page.shown_rewards())]
    assert len(shown) == len(group_of(page)["outputs"])
    assert run_curl(page.snippet("curl")) == close_to(shown)
    assert run_python(page.snippet("Python")) == close_to(shown)


def test_texts_are_shown_as_they_are(page):
    page.fill_in(**NASTY)
    page.score()
    shown = [text.get_property("textContent") for text in page.find_all("#ranking .text")]
    assert sorted(shown) == sorted(NASTY["outputs"])
    assert page.find_all("#ranking img") == []


def test_wrapper_and_deadline_reach_the_api_and_the_snippets(page, address):
    page.find("#advanced summary").click()
    page.find("[name=wrapper][value=pretrain]").click()
    page.find("#deadline").send_keys("25")
    expected = asked(address, {**group_of(page), "wrapper": "pretrain"})
    page.score()
    shown = [reward for _, reward in sorted(page.shown_rewards())]
    assert shown == close_to([row["reward"] for row in expected])
    body = page.snippet("curl").partition("<<'JSON'\n")[2].removesuffix("JSON")
    assert json.loads(body)["deadline_s"] == 25
    assert run_python(page.snippet("Python")) == close_to(shown)


@pytest.mark.parametrize("token", ["", "not-the-right-token", "not latin: 密码"])
def test_without_the_right_token_the_page_says_unauthorized(browser, guarded_address, token):
    page = Page(browser, guarded_address)
    page.use_token(token)
    page.score()
    assert page.text(".error .code") == "unauthorized"
    assert page.find("#token").get_attribute("aria-invalid") == "true"
    assert not page.shows("#ranking li")


def test_with_a_token_everything_works_and_the_token_is_nowhere_else(browser, guarded_address):
    page = Page(browser, guarded_address)
    assert page.text("#state") == "a token is needed"
    page.use_token(TOKEN)
    page.wait(lambda: page.text("#state").endswith("is ready"))
    page.score()
    shown = [reward for _, reward in sorted(page.shown_rewards())]
    for tab, run_snippet in (("curl", run_curl), ("Python", run_python)):
        assert TOKEN not in page.snippet(tab)
        assert run_snippet(page.snippet(tab), POLAR_RAY_TOKEN=TOKEN) == shown
    assert TOKEN not in browser.current_url
    assert browser.execute_script("return localStorage.length + document.cookie.length") == 0
    browser.refresh()
    page.wait(lambda: page.text("#state").endswith("is ready"))


def test_an_overloaded_endpoint_is_asked_again_after_a_countdown(browser):
    config = serve_config(queue={"max_queued_tokens": 1})
    with running_endpoint(config, fake_model(config, seconds_per_token=0.05)) as address:
        page = Page(browser, address)
        other = threading.Thread(target=asked, args=(address, {**group_of(page), "outputs": ["Peking."]}))
        other.start()
        page.wait(lambda: pending_tokens(address) > 0)
        page.score()
        assert page.text(".error .code") == "overloaded"
        assert "Score again in" in page.text("#alert button")
        other.join()
        page.wait(lambda: page.text("#alert button") == "Score again")
        page.press("Score again")
        page.wait(lambda: page.shows("#ranking .scored"))


def test_a_request_can_be_stopped(browser):
    config = serve_config()
    with running_endpoint(config, fake_model(config, seconds_per_token=0.02)) as address:
        page = Page(browser, address)
        page.press("Score")
        page.press("Stop")
        page.wait_for_answer()
        assert page.text("#progress") == "stopped"
        assert not page.shows("#ranking li")


@pytest.mark.parametrize("path", ["polar", "polar/"])
def test_the_page_works_below_a_route_prefix(browser, path):
    with running_endpoint(serve_config(), prefix="/polar") as address:
        page = Page(browser, f"{address}/{path}")
        page.score()
        shown = [reward for _, reward in sorted(page.shown_rewards())]
        assert run_curl(page.snippet("curl")) == shown
        assert run_python(page.snippet("Python")) == shown
        for link in page.find_all("nav a"):
            assert httpx.get(link.get_property("href")).status_code == 200


def test_an_endpoint_that_is_gone_is_reported(browser):
    with running_endpoint(serve_config()) as address:
        page = Page(browser, address)
    page.score()
    assert page.text(".error .code") == "no_answer"


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_the_page_fits_every_width(page, width):
    page.use_width(width)
    for name in ("Noisy neighbour", "Forged control tokens"):
        page.press(name)
        page.score()
        assert page.overflow() == 0, name
    page.fill_in("w" * 500, "w" * 500, ["w" * 500, "w" * 500])
    page.score()
    assert page.overflow() == 0, name


def test_whatever_can_be_filled_in_or_pressed_has_a_name(page):
    page.find("#advanced summary").click()
    page.score()
    fields = [field for field in page.find_all("textarea, input, button") if field.is_displayed()]
    assert len(fields) > 25
    assert [field.get_attribute("outerHTML") for field in fields if not field.accessible_name] == []


def test_tabs_are_moved_with_arrows(page):
    page.find("#tab-curl").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#tab-python").get_attribute("aria-selected") == "true"
    assert page.find("#snippet").text.startswith("from polar_ray import RewardClient")
