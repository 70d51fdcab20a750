"""The module draws in a browser what Python draws, and the page works, on a phone and in the dark too."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from benchmarks.javascript_runs import (
    JAVASCRIPT,
    camel_case,
    chromium_path,
    in_browser,
    node,
    serve,
)
from export.sampler import Sampler

CHROMIUM = chromium_path()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("node_packages"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's chromium)"),
]
IDLE, BUSY = "#draw:has-text('Draw'):not([disabled])", "#draw:has-text('Stop')"


@pytest.fixture(scope="module", name="serve_folder")
def _serve_folder():
    """A function from a folder to the address at which it is served."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(serve(folder))


@pytest.fixture(scope="module", name="chromium")
def _chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        )
        yield browser
        browser.close()


@pytest.fixture(name="open_page")
def _open_page(chromium):
    """A function that opens an address and returns the page; errors of a page fail the test."""
    pages, errors, addresses = [], [], []

    def open_page(url, *, width=1200, dark=False):
        page = chromium.new_page(
            viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light"
        )
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda each: each.type == "error" and errors.append(each.text))
        page.on("request", lambda request: addresses.append(request.url))
        pages.append(page)
        page.goto(url)
        return page

    open_page.errors, open_page.addresses = errors, addresses
    yield open_page
    for page in pages:
        page.close()


def test_the_module_draws_in_a_browser_what_python_draws(chromium, point_file, image_file, conditional_file):
    files = {"points": point_file, "image": image_file, "conditional": conditional_file}
    asked = [
        (kind, {"seed": 5, **options})
        for kind in ("points", "image")
        for options in (
            {},
            {"sampler": "ddpm", "num_steps": 20, "spacing": "trailing"},
            {"sampler": "dpmpp_2m", "num_steps": 7, "spacing": "logsnr"},
            {"sampler": "ddim", "num_steps": 5, "eta": 0.5, "spacing": "linspace"},
        )
    ]
    asked += [("conditional", each) for each in ({}, {"labels": "eel", "guidance_scale": 4.0, "seed": 2**32})]
    runs = [{"file": str(files[kind]), "count": 4, "options": camel_case(options)} for kind, options in asked]
    found = in_browser(chromium, runs)
    for (kind, options), outcome in zip(asked, found, strict=True):
        expected = Sampler(files[kind], provider="cpu").sample(4, **options)
        actual = np.array(outcome["samples"], dtype=np.float32).reshape(expected.shape)
        assert np.abs(actual - expected).max() <= 1e-4 * expected.std(), (kind, options)


def build(model, folder, *flags):
    return node(JAVASCRIPT / "page" / "build.js", model, folder, *flags)


@pytest.fixture(scope="module", name="page_url")
def _page_url(serve_folder, image_file, tmp_path_factory):
    """The page with the image model, and the largest folder that is allowed without WebGPU."""
    folder = tmp_path_factory.mktemp("page") / "page"
    result = build(image_file, folder, "--without-webgpu")
    assert result.returncode == 0, result.stderr
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20e6
    return serve_folder(folder)


def drawn(page):
    """The picture as a PNG in base64, once it stands still."""
    page.wait_for_selector(IDLE)
    page.wait_for_selector("#picture[aria-busy=false]")
    return page.evaluate("() => document.getElementById('canvas').toDataURL()")


def test_pressing_the_button_draws_and_a_seed_gives_the_same_picture(open_page, page_url):
    page = open_page(page_url)
    noise = drawn(page)
    assert page.inner_text("#row-label") == "Noise"
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    first = drawn(page)
    assert first != noise and page.inner_text("#row-label") == "Step 10 of 10"
    assert "64 images in" in page.inner_text("#status")
    page.fill("#seed", "1")
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    assert drawn(page) != first
    page.fill("#seed", "0")
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    assert drawn(page) == first
    page.fill("#row", "0")
    assert page.inner_text("#row-label") == "Noise" and drawn(page) == noise
    page.select_option("#sampler", "ddim")
    page.fill("#steps", "5")
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    assert drawn(page) != first and page.inner_text("#row-label") == "Step 5 of 5"
    with page.expect_download() as saved:
        page.click("#save")
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    assert not open_page.errors
    assert {url.split("/")[2] for url in open_page.addresses if not url.startswith("blob:")} == {
        page_url.split("/")[2]
    }


def drop(page, path):
    transfer = page.evaluate_handle(
        """([bytes, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(bytes)], name));
            return transfer;
        }""",
        [list(path.read_bytes()), path.name],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": transfer})


def test_another_file_can_be_dropped_and_its_points_are_those_of_python(
    open_page, page_url, conditional_file
):
    page = open_page(page_url)
    page.wait_for_selector(IDLE)
    drop(page, conditional_file)
    page.wait_for_selector("#model:has-text('points')")
    assert page.inner_text("#model").startswith("conditional.onnx · points with 2 columns · 3 classes")
    page.fill("#count", "50")
    page.select_option("#class", label="dog")
    page.fill("#guidance", "4")
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    with page.expect_download() as saved:
        page.click("#save")
    header, *rows = Path(saved.value.path()).read_text().splitlines()
    assert header == "height,weight"
    actual = np.array([row.split(",") for row in rows], dtype=np.float32)
    expected = Sampler(conditional_file, provider="cpu").sample(50, labels="dog", guidance_scale=4.0)
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
    assert not open_page.errors


def test_other_files_are_refused_in_a_line_and_the_model_before_goes_on(open_page, page_url, tmp_path):
    (tmp_path / "notes.onnx").write_bytes(b"These are notes, and no model.")
    page = open_page(page_url)
    page.wait_for_selector(IDLE)
    drop(page, tmp_path / "notes.onnx")
    page.wait_for_selector("#error:visible")
    message = page.inner_text("#error")
    assert message.startswith("notes.onnx: ") and "give the sampler.onnx of a run" in message
    assert len(message.splitlines()) == 1
    page.wait_for_selector(IDLE)
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    assert page.is_hidden("#error") and not open_page.errors


def test_it_can_be_stopped_and_never_freezes(open_page, page_url):
    """The longest gap between two frames while a thousand images are drawn stays far below a second."""
    page = open_page(page_url)
    page.wait_for_selector(IDLE)
    page.fill("#count", "2000")
    page.select_option("#sampler", "ddpm")
    page.fill("#steps", "20")
    page.wait_for_timeout(500)
    page.evaluate(
        """() => {
            let last = performance.now();
            window.longest = 0;
            setInterval(() => {
                window.longest = Math.max(window.longest, performance.now() - last);
                last = performance.now();
            }, 10);
        }"""
    )
    page.click("#draw")
    page.wait_for_selector(BUSY)
    page.wait_for_timeout(500)
    page.click("#draw")
    page.wait_for_selector(IDLE)
    assert page.inner_text("#status") == "Stopped" or "2000 images" in page.inner_text("#status")
    assert page.evaluate("() => window.longest") < 1000
    assert not open_page.errors


def test_a_network_that_never_ends_can_be_stopped(open_page, page_url, endless, image_file, tmp_path):
    (tmp_path / "endless.onnx").write_bytes(endless)
    page = open_page(page_url)
    page.wait_for_selector(IDLE)
    drop(page, tmp_path / "endless.onnx")
    page.wait_for_selector("#model:has-text('endless')")
    page.wait_for_selector(IDLE)
    page.click("#draw")
    page.wait_for_selector(BUSY)
    page.wait_for_timeout(300)
    page.click("#draw")
    page.wait_for_selector("#status:has-text('Stopped')")
    drop(page, image_file)
    page.wait_for_selector("#model:not(:has-text('endless'))")
    page.wait_for_selector(IDLE)
    page.click("#draw")
    page.wait_for_selector("#save:not([disabled])")
    assert not open_page.errors


@pytest.mark.parametrize("width", [320, 390, 768, 1200, 1920])
def test_nothing_is_wider_than_the_window(open_page, page_url, width):
    page = open_page(page_url, width=width)
    page.wait_for_selector(IDLE)
    page.click("summary")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    # A finger needs 24 pixels at least, WCAG 2.2 (2.5.8).
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, summary")]
            .filter((each) => each.offsetParent && each.type !== "radio" && each.type !== "checkbox")
            .filter((each) => each.getBoundingClientRect().height < 40)
            .map((each) => each.id || each.tagName)"""
    )
    assert small == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_and_every_control_has_a_name(open_page, page_url, dark):
    """Contrast of at least 4.5, as WCAG 2.2 asks for (1.4.3)."""
    page = open_page(page_url, dark=dark)
    page.wait_for_selector(IDLE)
    pairs = page.evaluate(
        """() => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const luminance = (colour) => {
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) =>
                    part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = (each) => {
                for (let at = each; at; at = at.parentElement) {
                    const colour = getComputedStyle(at).backgroundColor;
                    if (colour !== "rgba(0, 0, 0, 0)") return colour;
                }
            };
            const texts = "h1, p, label, span, legend, summary, button, input, select, code";
            return [...document.querySelectorAll(texts)]
                .filter((each) => each.offsetParent && !each.disabled)
                .filter((each) => each.textContent + (each.value ?? ""))
                .map((each) => {
                    const colours = [getComputedStyle(each).color, behind(each)];
                    const [light, dark] = colours.map(luminance).sort((a, b) => b - a);
                    const name = each.id || each.textContent.trim().slice(0, 20);
                    return [name, (light + 0.05) / (dark + 0.05)];
                });
        }"""
    )
    assert len(pairs) > 20
    assert [name for name, contrast in pairs if contrast < 4.5] == []
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input:not([hidden]), select, button, canvas")]
            .filter((each) => !each.labels?.length && !each.textContent.trim() && !each.ariaLabel)
            .map((each) => each.id)"""
    )
    assert unnamed == []
    assert page.evaluate("() => matchMedia('(prefers-color-scheme: dark)').matches") == dark


def test_opened_as_a_file_it_says_what_it_needs(open_page, page_url, image_file, tmp_path):
    build(image_file, tmp_path / "page", "--without-webgpu")
    page = open_page((tmp_path / "page" / "index.html").as_uri())
    page.wait_for_selector("#not-started:visible")
    assert "python3 -m http.server" in page.inner_text("#not-started")


def test_building_refuses_other_files_and_folders(image_file, tmp_path):
    (tmp_path / "notes.onnx").write_bytes(b"These are notes, and no model.")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for model, folder, message in (
        (tmp_path / "missing.onnx", tmp_path / "page", "does not exist"),
        (tmp_path / "notes.onnx", tmp_path / "page", "this is not an ONNX file"),
        (image_file, mine, "has other files"),
    ):
        result = build(model, folder)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert message in result.stderr
    assert (mine / "thesis.txt").read_text() == "years of work" and not (tmp_path / "page").exists()


def test_webgpu_is_loaded_by_its_switch_alone(image_file, tmp_path, open_page, serve_folder, chromium):
    """The browser of the other tests has no WebGPU; another one has it, emulated on the CPU."""
    result = build(image_file, tmp_path / "page")
    assert "for WebGPU" in result.stdout, result.stderr
    url = serve_folder(tmp_path / "page")
    page = open_page(url)
    page.wait_for_selector(IDLE)
    page.click("summary")
    assert page.is_hidden("#webgpu-field")
    fetched = [address for address in open_page.addresses if "webgpu" in address or "jsep" in address]
    assert not fetched

    flags = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    flags += ["--enable-features=Vulkan", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    browser = chromium.browser_type.launch(executable_path=CHROMIUM, args=flags)
    try:
        page = browser.new_page(viewport={"width": 600, "height": 844})
        page.set_default_timeout(120_000)
        page.goto(url)
        pixels = []
        for engine in ("WebAssembly", "WebGPU"):
            page.wait_for_selector(IDLE)
            if engine == "WebGPU":
                page.click("summary")
                page.check("#webgpu")
                page.wait_for_selector("#status:has-text('Press Draw')")
            page.fill("#count", "4")
            page.click("#draw")
            page.wait_for_selector("#save:not([disabled])")
            assert page.inner_text("#status").endswith(f"on {engine}"), page.inner_text("#error")
            drawn(page)
            pixels.append(
                page.evaluate(
                    """() => {
                        const canvas = document.getElementById("canvas");
                        const context = canvas.getContext("2d");
                        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
                        return [...data].filter((_, i) => i % 16 === 0);
                    }"""
                )
            )
        difference = np.abs(np.subtract(*map(np.array, pixels)))
        assert np.std(pixels[0]) > 20 and difference.max() <= 2
    finally:
        browser.close()
