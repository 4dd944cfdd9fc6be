"""A real browser for pages that the tests make: playwright's driver and the Chromium of the system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300_000  # milliseconds, on a machine with much else to do
WIDTHS = (380, 420, 768, 1024, 1600)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

# Boxes that are seen, and what is wrong with them: a page that scrolls sideways, sections or parts of figures one over
# another, what sticks out of its section, and texts of a figure that are cut off or lie over each other.
FAULTS = """
() => {
  const faults = [];
  const seen = (one) => one.getClientRects().length > 0 && one.getBoundingClientRect().width > 0;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)].filter(seen);
  const box = (one) => one.getBoundingClientRect();
  const named = (one) => `${one.tagName}.${one.className.baseVal ?? one.className} ${one.textContent.slice(0, 40)}`;
  const over = (a, b, slack) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > slack &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack;
  const apart = (ones, slack) => ones.forEach((a, i) => ones.slice(i + 1).forEach((b) => {
    if (over(box(a), box(b), slack)) faults.push(`${named(a)} lies over ${named(b)}`);
  }));
  const page = document.documentElement;
  if (page.scrollWidth > window.innerWidth) faults.push(`the page is ${page.scrollWidth} wide`);
  const sections = all("section");
  apart([...all("header"), ...sections], 1);
  for (const section of sections) {
    for (const one of all("*", section)) {
      if (one.closest(".scroll, pre, svg, [hidden], details:not([open])")) continue;
      const [inner, outer] = [box(one), box(section)];
      if (inner.right > outer.right + 1 || inner.left < outer.left - 1 || inner.bottom > outer.bottom + 1) {
        faults.push(`${named(one)} sticks out of ${section.querySelector("h2")?.textContent}`);
      }
    }
  }
  for (const figure of all(".figure")) {
    apart([".menus", ".plot", ".legend"].flatMap((one) => all(one, figure)), 1);
    apart(all(".menus > label, .legend > button", figure), 1);
    const plot = box(figure.querySelector(".plot"));
    if (!all(".main-svg", figure).length) faults.push("a figure that is seen is not drawn");
    const texts = all("svg text", figure).filter((one) => one.textContent.trim());
    for (const text of texts) {
      const inner = box(text);
      const sideways = inner.left < plot.left - 1 || inner.right > plot.right + 1;
      if (sideways || inner.top < plot.top - 1 || inner.bottom > plot.bottom + 1) {
        faults.push(`the text ${text.textContent} is cut off`);
      }
    }
    apart(texts, 4);
  }
  for (const one of all("nav")) apart(all("button", one), 1);
  return faults;
}
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a network."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright, an extra of development, is not installed")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, width: int) -> Iterator[Any]:
    """A page in a window of some width; fails on whatever it says on the console, throws or asks a network for."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(PATIENCE)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith(("http:", "https:")) and said.append(request.url))
    try:
        page.goto(file.as_uri())
        yield page
    finally:
        page.close()
    assert not said, said
