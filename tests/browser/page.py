"""The playground as a person uses it: fills in, presses, reads."""

from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ANSWER_S = 30

SET_TEXT = """
arguments[0].value = arguments[1];
arguments[0].dispatchEvent(new Event("input", { bubbles: true }));
"""


class Page:
    """An open playground in `browser`."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(f"http://{address}")
        self.wait(lambda: self.text("#state") != "connecting")

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text

    def texts(self, selector):
        return [found.text for found in self.find_all(selector)]

    def values(self, selector):
        return [found.get_property("value") for found in self.find_all(selector)]

    def shows(self, selector):
        return any(found.is_displayed() for found in self.find_all(selector))

    def wait(self, condition):
        WebDriverWait(self.browser, ANSWER_S).until(lambda _: condition())

    def press(self, name):
        """Click the first button in sight that says `name`."""
        buttons = self.browser.find_elements(By.XPATH, f"//button[normalize-space()='{name}']")
        next(button for button in buttons if button.is_displayed()).click()

    def fill_in(self, prompt, reference, outputs):
        """The group's texts, set at once: a driver's keys do not know every character."""
        while len(self.find_all("#outputs textarea")) < len(outputs):
            self.press("Add an output")
        while len(self.find_all("#outputs textarea")) > len(outputs):
            self.find("#outputs li:last-child button").click()
        areas = [self.find("#prompt"), self.find("#reference"), *self.find_all("#outputs textarea")]
        for area, text in zip(areas, [prompt, reference, *outputs], strict=True):
            self.browser.execute_script(SET_TEXT, area, text)

    def use_token(self, token):
        """Type a token and leave the field, which asks the endpoint anew."""
        if not self.find("#token").is_displayed():
            self.find("#advanced summary").click()
        self.find("#token").send_keys(token, "\t")

    def score(self):
        """Press Score and wait for what comes of it."""
        self.press("Score")
        self.wait_for_answer()

    def wait_for_answer(self):
        self.wait(lambda: self.text("#score") == "Score")

    def shown_rewards(self):
        """(place of the output in the form, its exact reward) from the first to the last."""
        rows = [(row.text, row.find_element(By.CSS_SELECTOR, ".value")) for row in self.find_all("#ranking .scored")]
        return [(_output_number(text) - 1, float(value.get_attribute("data-reward"))) for text, value in rows]

    def bar_widths(self):
        return [bar.rect["width"] for bar in self.find_all("#ranking .fill")]

    def snippet(self, tab):
        """The request in code, under the tab that says `tab`."""
        self.press(tab)
        return self.find("#snippet").get_property("textContent")

    def use_width(self, width):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def overflow(self):
        """Pixels by which the page is wider than its window."""
        return self.browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    def log(self):
        """What the browser complained of since this was last asked."""
        return self.browser.get_log("browser")


def _output_number(text):
    return next(int(line.removeprefix("output ")) for line in text.splitlines() if line.startswith("output "))
