"""Photograph a report for the README: at a desk, and on a phone in the dark.

    python -m benchmarks.shoot_report out/report.html

writes `docs/figures/report.png` and `report-phone.png`. Needs Chromium and playwright, as
`make test-browser` does.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
#: Sections that begin a column of the desk's picture, and a screen of the phone's.
COLUMNS, SCREENS = (None, "stages"), (None, "pictures", "stages", "kept")
DESK, PHONE = (1000, 1420), (390, 844)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(browser: Any, url: str, size: tuple[int, int], scheme: str, starts: Any) -> Any:
    """Return views of a page that begin at its sections (None: the top), side by side."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5
    )
    page = context.new_page()
    page.goto(url)
    views = []
    for start in starts:
        place = "0" if start is None else f"document.getElementById('{start}').offsetTop - 24"
        page.evaluate(f"window.scrollTo(0, {place})")
        views.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    context.close()
    gap = 0 if width > 500 else 24
    wide, tall = views[0].size
    sheet = Image.new("RGB", (len(views) * (wide + gap) - gap, tall), "white")
    for index, view in enumerate(views):
        sheet.paste(view, (index * (wide + gap), 0))
    return sheet


def main() -> None:
    """Write both pictures, in few colours: they are drawings and grey digits."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    url = parser.parse_args().report.resolve(strict=True).as_uri()
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit("shoot_report: there is no Chromium. apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        for name, size, scheme, starts in (
            ("report", DESK, "light", COLUMNS),
            ("report-phone", PHONE, "dark", SCREENS),
        ):
            sheet = photograph(browser, url, size, scheme, starts)
            place = FIGURES / f"{name}.png"
            sheet.quantize(96, dither=Image.Dither.NONE).save(place, optimize=True)
            print(f"wrote {place}, {place.stat().st_size:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
