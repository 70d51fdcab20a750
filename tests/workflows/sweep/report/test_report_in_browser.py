"""report.html in a real browser: figures, sorting and filters work, at every width, without a network."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's chromium)"),
]
DRAWN = "document.documentElement.dataset.plots === 'drawn'"
ROWS = "[...document.querySelectorAll('#trials tbody tr')]"
SHOWN = f"{ROWS}.filter(row => row.offsetParent).map(row => row.cells[0].dataset.value)"


class Browser:
    """One page at a time, with what it writes to the console as errors and what it asks for."""

    def __init__(self, chromium):
        self.chromium, self.errors, self.requests = chromium, [], []

    def open(self, url, *, width, dark=False, script=True):
        self.page = self.chromium.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda each: each.type == "error" and self.errors.append(each.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda each: self.requests.append(each.url))
        self.page.goto(url)

    def evaluate(self, expression):
        return self.page.evaluate(expression)

    def wait_for(self, condition):
        self.page.wait_for_function(condition)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        )
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium):
    browser = Browser(chromium)
    yield browser
    browser.page.close()


@pytest.fixture
def page(make_sweep):
    """URL of the report of a sweep with trials of every kind."""
    sweep = make_sweep()
    sweep.write()
    return (sweep.directory / "report.html").as_uri()


def click(browser, title):
    browser.evaluate(
        "[...document.querySelectorAll('#trials th button')]"
        f".find(each => each.textContent.startsWith('{title}')).click()"
    )


def test_figures_are_drawn_without_a_network_and_without_errors(browser, page):
    browser.open(page, width=1120)
    browser.wait_for(DRAWN)
    plots = browser.evaluate("document.querySelectorAll('.plot').length")
    assert plots >= 8
    assert browser.evaluate("document.querySelectorAll('.plot .main-svg').length") >= plots
    assert not browser.errors
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "blob"}


@pytest.mark.parametrize("width", [320, 390, 768, 1120, 1920])
def test_nothing_is_wider_than_the_window(browser, page, width):
    browser.open(page, width=width)
    browser.wait_for(DRAWN)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll, .plot') && "
        "each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 90))"
    )
    assert wide == []


def test_the_leaderboard_can_be_sorted_and_filtered(browser, page):
    browser.open(page, width=1120)
    browser.wait_for(DRAWN)
    assert browser.evaluate(SHOWN) == ["best", "second", "lowmse", "cut", "broken"]
    click(browser, "val/mse")
    assert browser.evaluate(SHOWN) == ["lowmse", "best", "second", "cut", "broken"]
    click(browser, "val/mse")
    assert browser.evaluate(SHOWN) == ["cut", "second", "best", "lowmse", "broken"], (
        "missing values stay last"
    )
    sorted_by = "[...document.querySelectorAll('#trials th[aria-sort]')].map(each => each.ariaSort)"
    assert browser.evaluate(sorted_by).count("descending") == 1
    browser.evaluate(
        "(() => { const form = document.querySelector('form.filters');"
        "form.elements.status.value = 'finished';"
        "form.elements.words.value = 'runner-up'; form.dispatchEvent(new Event('input')) })()"
    )
    assert browser.evaluate(SHOWN) == ["second"]
    assert browser.evaluate("document.querySelector('form.filters output').textContent") == "1 of 5 shown"


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_in_the_dark(browser, page, dark):
    """Contrast of at least 4.5, as WCAG 2.2 asks for (1.4.3), also of the figures' axes."""
    browser.open(page, width=1120, dark=dark)
    browser.wait_for(DRAWN)
    colours = browser.evaluate(
        """(() => {
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const rgb = colour => {
                canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const texts = 'p, .note, .badge, a, .good, .bad, th, td, summary, figcaption, .detail';
            const all = (elements, name) =>
                [...document.querySelectorAll(elements)].map(each => getComputedStyle(each)[name]);
            const seen = new Set([...all(texts, 'color'), ...all('.xtick text', 'fill')]);
            return [rgb(getComputedStyle(document.body).backgroundColor), [...seen].map(rgb)];
        })()"""
    )
    background, texts = colours
    assert (sum(background) < 150) == dark and len(texts) > 4
    for text in texts:
        assert contrast(text, background) >= 4.5, text


def contrast(one, other):
    """Contrast ratio of two colours, 1 to 21, by WCAG."""

    def luminance(colour):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_without_javascript_the_page_has_its_tables_and_pictures(browser, page):
    browser.open(page, width=390, script=False)
    assert browser.evaluate("!document.documentElement.dataset.plots")
    assert browser.evaluate(f"{ROWS}.length") == 5
    assert browser.evaluate("document.querySelector('form.filters').offsetParent === null")
    assert browser.evaluate(
        "[...document.images].every(each => each.loading === 'lazy' || each.naturalWidth)"
    )
    assert "Without JavaScript there are no interactive figures" in browser.evaluate(
        "document.body.innerText"
    )
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_can_be_printed(browser, page):
    browser.open(page, width=1120, dark=True)
    browser.wait_for(DRAWN)
    pdf = browser.page.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    assert browser.evaluate(DRAWN) and not browser.errors
