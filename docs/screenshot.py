"""The picture of the server's page: `python docs/screenshot.py RUN PICTURE`.

Needs chromium, and `pip install '.[test]'`, which brings Playwright.
"""

import io
import re
import shutil
import subprocess
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

# A field may be folded away, where Playwright cannot type.
SET = """(field, value) => {
    field.value = value;
    field.dispatchEvent(new Event("input", {bubbles: true}));
}"""


def main(run: str, picture: str) -> None:
    command = [sys.executable, "-m", "fastllm.serve", "--checkpoint", run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            address = next(filter(None, (re.search(r"http\S+", line) for line in server.stderr)))[0]
            image = Image.open(io.BytesIO(take(address)))
        finally:
            server.terminate()
    # A palette takes a third of the space.
    image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def take(address: str) -> bytes:
    """A picture of the page after a completion, with the alternatives of one letter shown."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.goto(address)
        page.fill("#prompt", "ROMEO:\nWhat light")
        for name, value in {"temperature": "0.6", "max_tokens": "110", "seed": "3"}.items():
            page.locator(f"[name={name}]").evaluate(SET, value)
        page.press("#prompt", "Control+Enter")
        page.locator("#state button").wait_for()  # the seed, shown at the end
        page.hover("#answer b >> nth=20")
        page.locator("#token li").first.wait_for()
        picture = page.screenshot()
        browser.close()
    return picture


if __name__ == "__main__":
    main(*sys.argv[1:])
