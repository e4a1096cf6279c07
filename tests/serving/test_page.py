"""The page in headless Chromium: every tab does its work, by keyboard too, and nothing is asked of other servers."""

from __future__ import annotations

import shutil
import time

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("there is no chromium with its driver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)
TABS = ("chat", "translate", "write", "compare", "inside")


class Page:
    """A browser at the page."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.until("document.querySelectorAll('[data-models] option').length > 0")

    def js(self, code: str):
        return self.driver.execute_script(code)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.js(f"return {condition}"):
            assert time.monotonic() < end, f"{condition}; {self.js('return document.body.innerText')}"
            time.sleep(0.05)

    def open(self, tab: str) -> None:
        self.find(f"#tab-{tab}").click()
        assert self.find(f"#{tab}").is_displayed()

    def choose(self, selector: str, value) -> None:
        self.js(f"""const it = document.querySelector('{selector}'); it.value = '{value}';
                    it.dispatchEvent(new Event('change'));""")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, server):
    driver.get_log("browser"), driver.get_log("performance")
    yield Page(driver, server.url)
    said = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [line for line in said if "Failed to load resource" not in line] == []  # the browser's own, of errors
    events = [entry["message"] for entry in driver.get_log("performance")]
    asked = "".join(event for event in events if 'requestWillBeSent"' in event)
    assert "http://" not in asked.replace(server.url, "").replace("http://www.w3.org", "") and "https://" not in asked


def test_tabs_are_chosen_by_keys(page):
    page.find("#tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert page.js("return document.activeElement.id") == "tab-translate" and page.find("#translate").is_displayed()
    page.driver.switch_to.active_element.send_keys(Keys.END)
    assert page.js("return location.hash") == "#inside"
    assert page.js("return document.querySelectorAll('[role=tab][aria-selected=true]').length") == 1
    assert page.js("return document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == 1


def test_a_conversation_is_written_and_stopped_and_begun_again(page, lms):
    page.open("chat")
    page.choose("#chat [data-temperature]", 0)
    page.choose("#chat [data-tokens]", 6)
    page.find("#say").send_keys("the cat", Keys.ENTER)
    page.until("document.querySelectorAll('#chat .acts').length === 1")
    wanted = lms["tiny"].generate([{"role": "user", "content": "the cat"}], max_new_tokens=6)[0]
    assert page.js("return document.querySelector('#chat .assistant .said').textContent") == wanted.lstrip()
    assert not page.find("#chat .assistant").get_attribute("aria-busy")
    page.find("#chat [data-clear]").click()
    assert page.js("return document.querySelectorAll('#chat .said').length") == 0


def test_sentences_are_translated_and_alternatives_taken(page, lms):
    page.open("translate")
    page.find("#source").send_keys("the cat.\non and on")
    page.until("document.querySelectorAll('#translate .line').length === 2")
    best = lms["words"].translate(["the cat.", "on and on"], beam=5)
    lines = "return [...document.querySelectorAll('#translate .line')].map((each) => each.textContent)"
    assert page.js(lines) == best
    page.find("#translate .line").click()
    other = page.js("return document.querySelector('#translate .choices span').textContent")
    page.find("#translate .choices button").click()
    assert page.js(lines) == [other, best[1]]
    assert page.js("return document.activeElement.className") == "line"


def test_proposals_are_accepted_and_rejected_one_by_one(page):
    page.open("write")
    page.choose("#write [data-models]", "plain")
    page.choose("#write [data-tokens]", 4)
    page.find("#text").send_keys("the cat")
    page.find("#write [data-do=continue]").click()
    page.until("!document.querySelector('#write [data-reviewing]').hidden")
    added = page.js("return document.querySelector('#write ins').textContent")
    assert added and page.find("#write .change button").get_attribute("aria-label").startswith("Accept: insert")
    page.find("#write .change button").click()
    assert page.find("#text").get_attribute("value") == "the cat" + added
    assert page.js("return document.activeElement.id") == "text"


def test_the_difference_of_two_texts_makes_either_of_them(page):
    pairs = [
        ("the old man sat by the sea", "an old man stood by the sea"), ("", "new"), ("gone", ""), ("same", "same"),
        ("a b c d", "d c b a"), ("one. two, three", "one. three!"),
    ]
    for before, after in pairs:
        parts = page.driver.execute_async_script(
            "const [a, b, done] = arguments; import('/diff.js').then(({diff}) => done(diff(a, b)))", before, after
        )
        assert "".join(part.get("text", part.get("cut", "")) for part in parts) == before
        assert "".join(part.get("text", part.get("add", "")) for part in parts) == after
        assert all(part.get("text") or part.get("cut") or part.get("add") for part in parts)
    assert len(parts) > 2


def test_two_models_are_compared(page, lms):
    page.open("compare")
    page.choose("#compare [data-tokens]", 6)
    page.js("document.querySelector('#prompt').value = 'the cat'")
    page.find("#compare [data-run]").click()
    page.until("document.querySelector('#compare [data-status]').textContent.includes('what differs is underlined')")
    texts = page.js("return [...document.querySelectorAll('#compare .sheet')].map((each) => each.textContent)")
    assert texts == [lms[name].generate("the cat", max_new_tokens=6)[0] for name in ("tiny", "plain")]
    assert "Bytes in memory" in page.find("#compare tbody").text


def test_a_look_inside_shows_candidates_attributions_and_attention(page):
    page.open("inside")
    page.choose("#inside [data-models]", "tiny")
    page.js("document.querySelector('#look').value = 'the cat'")
    page.find("#inside [data-run]").click()
    page.until("!document.querySelector('#inside [data-found]').hidden")
    count = "return document.querySelectorAll('#inside {}').length"
    assert page.js(count.format("[data-next] button")) == 10
    assert page.js(count.format("[data-scores] span")) == 7
    assert page.js(count.format(".heads button")) == 4
    assert "head 1: 7 tokens attend to 7" in page.find("#inside [data-map]").get_attribute("aria-label")
    second = page.find("#inside [data-next] li:nth-child(2) .text").text
    page.find("#inside [data-next] li:nth-child(2) button").click()
    page.until(f"document.querySelector('#inside [data-token]').textContent === '{second}'")
    page.find("#inside [data-from] button").click()
    page.until("document.querySelector('#inside [data-looks]').textContent.includes('(100.0%)')")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window_and_everything_has_a_name(page, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for tab in TABS:
            page.open(tab)
            assert page.js("return document.documentElement.scrollWidth") <= width, tab
        unnamed = page.js("""
            return [...document.querySelectorAll('button, input, select, textarea, canvas[role]')].filter((each) =>
              !(each.textContent.trim() || each.ariaLabel || each.labels?.length || each.tagName === 'CANVAS')
            ).map((each) => each.outerHTML)""")
        assert unnamed == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_mistakes_are_told_where_everybody_sees_them(page):
    page.open("chat")
    page.find("#say").send_keys("ÉÉ", Keys.ENTER)
    page.until("!document.querySelector('#notice').hidden")
    assert "does not know" in page.find("#notice").text and page.find("#notice").get_attribute("role") == "alert"
