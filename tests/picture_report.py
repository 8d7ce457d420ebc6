"""The picture of a report that the front page shows; by hand, after a run:

python tests/picture_report.py runs/laptop nbs/report.png
"""

import sys
from base64 import b64decode, b64encode
from pathlib import Path

from conftest import CHROMIUM, FLAGS
from playwright.sync_api import sync_playwright

from cmixtral_nb.notebooks import light_png

WIDE, TALL = 1100, 900  # pixels


def picture(run, out):
    "The top of a report as a PNG of few colours"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=WIDE, height=TALL), color_scheme="light")
        page.goto((Path(run).resolve() / "report.html").as_uri())
        taken = page.screenshot()
        browser.close()
    Path(out).write_bytes(b64decode(light_png(b64encode(taken).decode())))


if __name__ == "__main__":
    picture(*sys.argv[1:])
