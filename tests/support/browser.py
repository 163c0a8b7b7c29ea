"""A real browser on the page: mouse, keys, and what it shows."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.page import until

Point = tuple[float, float]

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROME = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]

DROP = """
    const moved = new DataTransfer();
    for (const [data, name] of arguments[0]) {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        const type = name.endsWith("json") ? "application/json" : "image/png";
        moved.items.add(new File([bytes], name, { type }));
    }
    window.dispatchEvent(new DragEvent("drop", { dataTransfer: moved, cancelable: true }));
"""


@contextmanager
def opened(profile: Path) -> Iterator["Browser"]:
    """A browser with a profile of its own; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROME or not DRIVER:
        pytest.skip("there is no Chromium with a chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for option in [*OPTIONS, f"--user-data-dir={profile}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, address: str, size: tuple[int, int] = (1280, 860), sharp: float = 1) -> None:
        """Open an address in a window of a size, with so many pixels of the screen per pixel of the page."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": sharp, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(address)
        until(lambda: self.text("model-state") not in ("", "loading the model"))
        until(lambda: self.driver.find_elements("css selector", "[data-preset][aria-checked=true]"))

    def element(self, selector: str) -> Any:
        found = selector if any(mark in selector for mark in "# .[>") else f"#{selector}"
        return self.driver.find_element("css selector", found)

    def click(self, selector: str) -> None:
        self.element(selector).click()

    def text(self, name: str) -> str:
        return self.element(name).text

    def value(self, name: str) -> str:
        return self.element(name).get_attribute("value")

    def shown(self, name: str) -> bool:
        return self.element(name).is_displayed()

    def enabled(self, name: str) -> bool:
        return self.element(name).is_enabled()

    def keys(self, *keys: str) -> None:
        """Press keys together; the last is let go first."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.key_down(key)
        for key in reversed(keys):
            actions.key_up(key)
        actions.perform()

    def mouse(self, *points: Point, release: bool = True) -> None:
        """Press at the first point, move through the others, let go at the last; points of the window."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver, duration=5)
        pointer = actions.w3c_actions.pointer_action
        for number, (x, y) in enumerate(points):
            pointer.move_to_location(round(x), round(y))
            if number == 0:
                pointer.pointer_down()
        if release:
            pointer.pointer_up()
        actions.perform()

    def lift(self, at: Point) -> None:
        """Move a mouse that is held to a point of the window and let it go."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver, duration=5)
        actions.w3c_actions.pointer_action.move_to_location(round(at[0]), round(at[1]))
        actions.w3c_actions.pointer_action.pointer_up()
        actions.perform()

    def wheel(self, at: Point, turns: int) -> None:
        event = {"type": "mouseWheel", "x": at[0], "y": at[1], "deltaX": 0, "deltaY": 100 * turns}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def drop(self, *files: Path) -> None:
        """Drop files on the page."""
        parts = [[base64.b64encode(file.read_bytes()).decode(), file.name] for file in files]
        self.driver.execute_script(DROP, parts)

    def settle(self) -> None:
        """Let the page draw what has happened."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def drags(self) -> list[list[float]]:
        """Handle and target of every drag, as the list of the page has them."""
        read = "return [...document.querySelectorAll('#drags input')].map((box) => Number(box.value))"
        values = self.driver.execute_script(read)
        return [values[i : i + 4] for i in range(0, len(values), 4)]

    def screenshot(self, name: str = "") -> np.ndarray:
        """Pixels of the screen, (height, width, 3)."""
        self.settle()
        content = self.driver.get_screenshot_as_png()
        if name:
            Path(name).write_bytes(content)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]
