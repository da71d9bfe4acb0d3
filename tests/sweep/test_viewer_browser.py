"""The page in a real browser: open, compare, zoom, sort, filter, and come back by the address."""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dype.sweep import viewer

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.common.exceptions import SessionNotCreatedException  # noqa: E402
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
# no sandbox, because root has none; the others keep Chromium from asking for updates
SWITCHES = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync")
SWITCHES += ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage")
PROMPT = "<img src=x onerror=\"document.title='broken'\"></script>&amp;"


def start_browser(*switches: str):
    """Start Chromium with its log of errors on."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in SWITCHES + switches:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except SessionNotCreatedException as error:
        pytest.skip(f"Chromium does not start: {error.msg}")


@pytest.fixture(scope="module")
def driver():
    """A browser for all tests."""
    browser = start_browser()
    yield browser
    browser.quit()


@pytest.fixture
def browser(driver):
    """The browser; the test fails if a page logs an error other than of a file that is missing."""
    set_screen(driver, 1000, 700)
    yield driver
    errors = [entry["message"] for entry in driver.get_log("browser")]
    assert not [message for message in errors if "ERR_FILE_NOT_FOUND" not in message]


def set_screen(browser, width: int, height: int, ratio: float = 1, scheme: str = "light") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The address of a page of two methods and three seeds, with images of random pixels."""
    folder = tmp_path_factory.mktemp("sweep")
    rng, images = np.random.default_rng(0), []
    for method in ("dy_yarn", "base"):
        for seed in range(3):
            path = folder / f"{method} #{seed}.png"
            side = 1200 if method == "dy_yarn" else 600
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
            settings = {"method": method, "seed": f"{seed}", "prompt": PROMPT}
            scores = {"seconds": 10.0 - seed, "lite0": 5.0 + 10 * seed}
            if method == "base":
                del scores["lite0"]
            images.append({"path": path, "settings": settings, "scores": scores, "error": ""})
    images[-1]["error"] = "out of memory <b>"
    return viewer.write_page(images, folder / "index.html").as_uri()


def wait_for(browser, script: str):
    """Return the value of a script as soon as it is true."""
    return WebDriverWait(browser, 30, 0.02).until(lambda _: browser.execute_script(script))


def open_page(browser, address: str) -> None:
    browser.get("about:blank")  # because another # of the same file does not load it again
    browser.get(address)
    wait_for(browser, "return typeof state === 'object' && document.readyState === 'complete'")


def wait_for_images(browser) -> None:
    """Wait until the open images are drawn, and drawn well."""
    wait_for(
        browser, "return pictures.size && [...pictures.values()].every(p => p.status !== 'loading')"
    )
    wait_for(browser, "return !isMoving && frame === undefined")


def stage_pixels(browser) -> np.ndarray:
    """Return the pixels of the canvas as the screen shows them, [height, width, 3]."""
    wait_for_images(browser)
    box = browser.execute_script("""
        const box = canvas.getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom].map((v) => v * devicePixelRatio)""")
    data = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB").crop(box)).astype(int)


def file_pixels(address: str, name: str) -> np.ndarray:
    folder = Path(address.removeprefix("file://")).parent
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)",
        selector,
    )


def click(browser, selector: str, number: int = 0) -> None:
    element = browser.find_elements("css selector", selector)[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def compare(browser, page: str, *numbers: int, words: str = "") -> None:
    """Open images of the page, by their number, with further words of the address."""
    open_page(browser, page)
    ids = browser.execute_script("return page.images.map((image) => image.id)")
    chosen = ",".join(ids[number] for number in numbers)
    open_page(browser, f"{page}#view=image&images={chosen}{words}")
    wait_for_images(browser)


def test_grid(browser, page):
    """Methods are rows, seeds columns; alt texts say the settings; a prompt is never HTML."""
    open_page(browser, page)
    assert texts(browser, "#grid th[scope=col]") == ["seed 0", "seed 1", "seed 2"]
    assert texts(browser, "#grid th[scope=row]") == ["1200x1200, dy_yarn", "600x600, base", "base"]
    assert texts(browser, "#prompt") == [PROMPT]
    assert texts(browser, "#grid .box") == ["out of memory <b>"]
    alts = browser.execute_script(
        "return [...document.querySelectorAll('#grid img')].map(i => i.alt)"
    )
    assert alts[:2] == ["1200x1200, dy_yarn, seed 0", "1200x1200, dy_yarn, seed 1"]
    wait_for(
        browser, "return [...document.querySelectorAll('#grid img')].every(i => i.naturalWidth)"
    )
    assert browser.title != "broken"


def test_one_row_wraps(browser, page):
    """Images of one row, as of a folder of photographs, fill the width of the screen."""
    open_page(browser, page + "#not.method=base")
    assert texts(browser, "#grid .name") == ["seed 0", "seed 1", "seed 2"]
    place = (
        "return [...document.querySelectorAll('figure')].map((f) => f.getBoundingClientRect().top)"
    )
    assert len({*browser.execute_script(place)}) == 1
    set_screen(browser, 390, 800)
    browser.refresh()
    assert len({*browser.execute_script(place)}) == 2


def test_filters_and_axes(browser, page):
    open_page(browser, page)
    click(browser, "#filters summary", 2)
    click(browser, "#filters [data-name=seed] input", 1)
    assert texts(browser, "#grid th[scope=col]") == ["seed 0", "seed 2"]
    assert texts(browser, "#filters [data-name=seed] summary") == ["seed: 2 of 3"]
    assert texts(browser, "#count") == ["4 of 6 images"]
    browser.refresh()
    assert texts(browser, "#count") == ["4 of 6 images"]
    browser.find_element("css selector", "#columns").send_keys("method")
    assert texts(browser, "#grid th[scope=col]") == ["dy_yarn", "base"]
    browser.find_element("css selector", "#rows").send_keys("method")
    assert texts(browser, "#grid th[scope=row]") == ["dy_yarn", "base"]
    assert browser.execute_script("return byId('columns').value") == ""
    browser.find_element("css selector", "#rows").send_keys("seed")
    open_page(browser, page + "#not.seed=0&not.seed=1&not.seed=2")
    assert texts(browser, "#count") == ["0 of 6 images"]
    click(browser, "#show-all")
    assert texts(browser, "#count") == ["6 images"]
    open_page(browser, page + "#rows=none")
    assert texts(browser, "figcaption")[:2] == ["1200x1200, dy_yarn", "600x600, base"]


def test_table(browser, page):
    """A click on a head sorts, a second click the other way; images without a value are last."""
    open_page(browser, page)
    click(browser, "[data-view=table]")
    click(browser, "[data-sort=lite0]")
    column = "#table tbody td:last-child"
    assert texts(browser, column) == ["5.000", "15.000", "25.000", "", "", ""]
    assert texts(browser, "[aria-sort=ascending]") == ["lite0 \u2191"]
    assert "seconds \u2195" in texts(browser, "th")
    click(browser, "[data-sort=lite0]")
    assert texts(browser, column) == ["25.000", "15.000", "5.000", "", "", ""]
    browser.refresh()
    assert texts(browser, column) == ["25.000", "15.000", "5.000", "", "", ""]
    click(browser, "#mean")
    assert texts(browser, column)[0] == "15.000 (10.000)"


def test_pixels_of_a_dense_screen(page):
    """At 1:1 a pixel of the image is a pixel of the device."""
    # another browser, because an emulated ratio is drawn in another way
    browser = start_browser("force-device-scale-factor=1.5", "window-size=800,600")
    try:
        compare(browser, page, 0, words="&zoom=1&x=0.5&y=0.5")
        pixels = stage_pixels(browser)
        assert "1:1" in texts(browser, ".label")[0]
    finally:
        browser.quit()
    y, x = (side // 2 for side in pixels.shape[:2])
    part, image = pixels[y - 50 : y + 50, x - 50 : x + 50], file_pixels(page, "dy_yarn #0.png")
    starts = [(550 + dy, 550 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert any((image[y : y + 100, x : x + 100] == part).all() for y, x in starts)


def test_zoom_to_8_to_1(browser, page):
    """Keys zoom; at 8:1 a pixel is a square of 8 px of one color."""
    compare(browser, page, 0)
    body = browser.find_element("css selector", "body")
    assert browser.execute_script("return arrangeView().zoom") < 1  # fit
    body.send_keys("8")
    pixels = stage_pixels(browser)[100:]  # below the label
    for axis in (0, 1):
        steps = np.diff(pixels, axis=axis).any(axis=(1 - axis, 2)).nonzero()[0]
        assert len(steps) > 50
        assert set(np.diff(steps)) == {8}
    fit = browser.execute_script("return formatZoom(arrangeView().fit)")
    for keys, scale in (("+++++", "8:1"), ("-", "4:1"), ("---", fit), ("+", "1:1")):
        body.send_keys(keys)
        wait_for_images(browser)
        assert texts(browser, "#scale") == [scale]
    body.send_keys("0")
    wait_for_images(browser)
    assert texts(browser, "#scale") == [fit]


def test_wheel_and_drag(browser, page):
    """The wheel zooms at the pointer, whose place stays; a drag moves by the pixels dragged."""
    compare(browser, page, 0, words="&zoom=1")
    stage = browser.find_element("css selector", "canvas")
    place = """
        const {x, y, zoom, extent, panes} = arrangeView();
        return [x * extent[0] + 100 / zoom, y * extent[1] + 50 / zoom]"""
    before = browser.execute_script(place)
    actions = webdriver.ActionChains(browser)
    actions.scroll_from_origin(ScrollOrigin.from_element(stage, 100, 50), 0, -400).perform()
    wait_for_images(browser)
    assert browser.execute_script("return arrangeView().zoom") == 2
    assert browser.execute_script(place) == pytest.approx(before, abs=1)
    center = "const {x, y, zoom, extent} = arrangeView(); return [x * extent[0], y * extent[1]]"
    before = browser.execute_script(center)
    actions = webdriver.ActionChains(browser, duration=20)
    actions.move_to_element(stage).click_and_hold().move_by_offset(-60, 40).release().perform()
    wait_for_images(browser)
    after = browser.execute_script(center)
    assert np.subtract(after, before) == pytest.approx([30, -20], abs=0.6)


def test_pinch(browser, page):
    compare(browser, page, 0, words="&zoom=1")
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    for kind, distance in (
        ("touchStart", 50),
        ("touchMove", 90),
        ("touchMove", 200),
        ("touchEnd", 0),
    ):
        points = [{"x": 300 + side * distance, "y": 300, "id": side + 1} for side in (-1, 1)]
        points = [] if kind == "touchEnd" else points
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    wait_for_images(browser)
    assert browser.execute_script("return arrangeView().zoom") == 4


def test_slider_at_the_same_place(browser, page):
    """Left of the handle is A, right of it B, half as large and drawn at 2:1."""
    compare(browser, page, 0, 3, words="&mode=slider&zoom=1&split=0.5")
    assert [label.split(", ")[-1] for label in texts(browser, ".label")] == ["1:1", "2:1"]
    pixels = stage_pixels(browser)
    left, top = browser.execute_script("""
        const {x, y, panes: [pane]} = arrangeView();
        return [Math.round(pane.width / 2 - x * 1200), Math.round(pane.height / 2 - y * 1200)]""")
    large, small = (file_pixels(page, f"{method} #0.png") for method in ("dy_yarn", "base"))
    small = small.repeat(2, 0).repeat(2, 1)
    edge, height, width = round(pixels.shape[1] / 2), *pixels.shape[:2]
    rows = slice(100, height - 20)  # below the labels
    expected = [image[-top:, -left:][:height, :width][rows] for image in (large, small)]
    assert (pixels[rows, : edge - 20] == expected[0][:, : edge - 20]).all()
    assert (pixels[rows, edge + 20 :] == expected[1][:, edge + 20 :]).all()
    handle = browser.find_element("css selector", "#handle")
    webdriver.ActionChains(browser, duration=20).drag_and_drop_by_offset(handle, 50, 0).perform()
    moved = browser.execute_script("return state.split * canvas.width")
    assert moved == pytest.approx(edge + 50, abs=3)
    handle.send_keys(Keys.ARROW_LEFT)
    assert browser.execute_script("return state.split * canvas.width") < moved
    handle.send_keys(Keys.END)
    assert browser.execute_script("return state.split") == 1


def test_difference(browser, page):
    """The difference of an image with itself is black; the factor doubles it."""
    compare(browser, page, 0, 1, words="&mode=difference&zoom=1")
    pixels = stage_pixels(browser)[100:]
    images = [file_pixels(page, f"dy_yarn #{seed}.png") for seed in (0, 1)]
    left, top = browser.execute_script("""
        const {x, y, panes: [pane]} = arrangeView();
        return [Math.round(pane.width / 2 - x * 1200), Math.round(pane.height / 2 - y * 1200)]""")
    height, width = pixels.shape[:2]
    expected = abs(images[0] - images[1])[100 - top :, -left:][:height, :width]
    assert (pixels == expected).all()
    browser.find_element("css selector", "#gain select").send_keys("2")
    assert abs(stage_pixels(browser)[100:] - np.minimum(2 * expected, 255)).max() <= 1


def test_blink(browser, page):
    compare(browser, page, 0, 1, 2, words="&mode=blink")
    assert texts(browser, ".label")[0].startswith("A")
    body = browser.find_element("css selector", "body")
    for letter in "BCA":
        body.send_keys(Keys.SPACE)
        wait_for_images(browser)
        assert texts(browser, ".label")[0].startswith(letter)
    click(browser, "#auto input")
    wait_for(browser, "return state.front > 0")


def test_from_the_grid_and_back(browser, page):
    """Picked images are compared; the address opens the same view; Back returns to the grid."""
    open_page(browser, page)
    for number in (0, 3):
        click(browser, "figure input", number)
    click(browser, "#compare")
    wait_for_images(browser)
    body = browser.find_element("css selector", "body")
    body.send_keys("1")
    body.send_keys(Keys.ARROW_RIGHT)
    wait_for_images(browser)
    wait_for(browser, "return location.hash.includes('x=')")
    address, pixels = browser.current_url, stage_pixels(browser)
    rows = texts(browser, "#info th[scope=row]")
    assert texts(browser, "#info h2") == ["Settings that differ", "Measured", "Files"]
    assert rows == ["size", "method", "seconds", "lite0"]
    open_page(browser, address)
    assert (stage_pixels(browser) == pixels).all()
    body = browser.find_element("css selector", "body")
    body.send_keys(Keys.ESCAPE)
    assert not browser.find_element("css selector", "#stage").is_displayed()
    assert browser.execute_script("return pictures.size") == 0  # so that nothing stays decoded
    browser.back()
    wait_for(browser, "return state.view === 'image'")


def test_neighbors(browser, page):
    """A single image names the settings in which its neighbors differ, and leads to them."""
    compare(browser, page, 1, words="&zoom=2&x=0.4")
    assert texts(browser, "#info .bar button:first-child") == [
        "\u2190 seed 0",
        "\u2192 seed 2",
        "\u2193 600x600, base",
    ]
    browser.find_element("css selector", "body").send_keys(".")
    wait_for_images(browser)
    assert texts(browser, ".label")[0].startswith("1200x1200, dy_yarn, seed 2")
    assert browser.execute_script("return [state.zoom, state.x]") == [2, 0.4]


def test_only_open_images_are_loaded(browser, page):
    """The grid loads thumbnails alone; what is closed gives its pixels back."""
    source = """
        window.sources = [];
        const {get, set} = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, "src");
        Object.defineProperty(HTMLImageElement.prototype, "src", {
          get, set(value) { sources.push(value); set.call(this, value); }});"""
    command = "Page.addScriptToEvaluateOnNewDocument"
    script = browser.execute_cdp_cmd(command, {"source": source})
    open_page(browser, page)
    sources = browser.execute_script("return sources.splice(0)")
    assert len(sources) == 5  # of six images one failed
    assert all(name.startswith("thumbs/") for name in sources)
    click(browser, "figure button", 2)
    wait_for_images(browser)
    sources = browser.execute_script("return sources.splice(0)")
    assert sorted(sources) == ["dy_yarn%20%232.png", "thumbs/dy_yarn%20%232.jpg"]
    has_source = """
        const [{element}] = pictures.values();
        goBack();
        return element.hasAttribute("src")"""
    assert not browser.execute_script(has_source)
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_keyboard(browser, page):
    """Enter opens, Tab stays among what is seen, Space picks, Escape goes back to the image."""
    open_page(browser, page)
    browser.find_elements("css selector", "figure button")[1].send_keys(Keys.ENTER)
    wait_for_images(browser)
    is_covered = "return Boolean(document.activeElement.closest('header, main, footer'))"
    for _ in range(30):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        assert not browser.execute_script(is_covered)
    browser.find_element("css selector", "canvas").send_keys(Keys.ESCAPE)
    focused = browser.switch_to.active_element
    assert focused == browser.find_elements("css selector", "figure button")[1]
    for number in (1, 2):
        browser.find_elements("css selector", "figure button")[number].send_keys(Keys.SPACE)
    assert texts(browser, "#chosen") == ["2 images to compare, at most 4"]
    browser.switch_to.active_element.send_keys("c")
    wait_for_images(browser)
    assert browser.execute_script("return state.images.length") == 2
    browser.find_element("css selector", "body").send_keys("?")
    assert browser.find_element("css selector", "#help").is_displayed()


def test_missing_files(browser, page, tmp_path):
    """A page whose images were deleted says so, and goes on."""
    folder = tmp_path / "copy"
    shutil.copytree(Path(page.removeprefix("file://")).parent, folder)
    (folder / "dy_yarn #0.png").unlink()
    for path in folder.glob("thumbs/dy_yarn*0.jpg"):
        path.unlink()
    address = (folder / "index.html").as_uri()
    open_page(browser, address)
    wait_for(browser, "return document.querySelectorAll('#grid .box').length === 2")
    assert texts(browser, "#grid .box")[0] == "dy_yarn #0.png: no thumbnail"
    compare(browser, address, 0, 1)
    assert "is missing or broken" in texts(browser, ".label")[0]
    assert texts(browser, ".label")[1].endswith(" %")
    open_page(browser, f"{address}#view=image&images=00000000")
    assert texts(browser, "#notice")[0].endswith("that this page does not have: 1.")


def test_theme_and_phone(browser, page):
    """Both themes follow the system, the button changes them, and nothing is wider than a phone."""
    background = "return getComputedStyle(document.body).backgroundColor"
    colors = []
    for scheme in ("light", "dark"):
        set_screen(browser, 390, 800, 2, scheme)
        open_page(browser, page)
        colors.append(browser.execute_script(background))
        width = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
        assert browser.execute_script(width) == 0
    assert len({*colors}) == 2
    assert texts(browser, "#theme") == ["Theme: system"]
    click(browser, "#theme")
    assert texts(browser, "#theme") == ["Theme: light"]
    assert browser.execute_script(background) == colors[0]
    compare(browser, page, 0, 1)
    assert browser.execute_script("return arrangeView().panes.map((pane) => pane.x)") == [0, 0]
    buttons = browser.find_elements("css selector", "#stage > .bar button")
    assert all(button.location["x"] + button.size["width"] <= 390 for button in buttons)
