"""Take the README's screenshot: the demo's edit on the page, finished, beside the original.

    PYTHONPATH=tests python tests/page/screenshot.py [OUT.png]

The PNG also lists the texts of the code that it shows; a test compares them with the code of today.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin
from support.browser import Browser, opened
from support.page import SCREENSHOT, code_texts, serving_demo, until

SIZE = (1280, 860)
TEXTS = """
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const texts = new Set();
    while (walker.nextNode()) {
        const { parentElement: parent, textContent } = walker.currentNode;
        if (parent.checkVisibility() && parent.getClientRects().length) texts.add(textContent.trim());
    }
    return [...texts].filter(Boolean);
"""  # visible on the page


def edit(browser: Browser, address: str) -> None:
    """Run the demo's edit and wait for its result."""
    browser.open(address, SIZE)
    if browser.driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches"):
        browser.click("theme")
    browser.click("run")
    until(lambda: browser.shown("progress-card"))
    until(lambda: browser.shown("result-card"), seconds=600)


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with serving_demo() as client, opened(Path(folder) / "profile") as browser:
            edit(browser, client.site.address)
            pixels = browser.screenshot()
            code = code_texts(client)
            texts = [text for text in browser.driver.execute_script(TEXTS) if text in code]
    info = PngImagePlugin.PngInfo()
    info.add_text("texts", json.dumps(texts))
    Image.fromarray(pixels).save(out, pnginfo=info, optimize=True)
    print(f"{out}: {len(texts)} texts of the code, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else SCREENSHOT).resolve())
