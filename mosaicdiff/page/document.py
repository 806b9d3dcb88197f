"""The whole page: sections in order, style and script within, nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path

from ..files import write_text
from ..quantities import human_bytes
from .compare import pictures_section
from .data import Page
from .headline import headline
from .markup import Markup, element, join
from .networks import network_sections
from .quality import cost_section, quality_section
from .reproduce import reproduce_section
from .speed import speed_section


def write_page(page: Page, path: Path) -> int:
    """Write a report as one file that opens from disk; readers never see a half.

    Returns:
        Its bytes.
    """
    text = render(page)
    write_text(path, text)
    return len(text.encode())


def render(page: Page) -> str:
    """Return a report as HTML that loads nothing: its own policy forbids that."""
    style = _own("style.css")
    script = _own("script.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{page.model}: mosaicdiff report"),
        element("style", style),
    )
    sections: list[Markup | None] = [
        pictures_section(page),
        quality_section(page),
        cost_section(page),
        *network_sections(page),
        speed_section(page),
        reproduce_section(page),
    ]
    main = element("main", *sections)
    size = len(head.encode()) + len(main.encode()) + len(script.encode())
    pictures = sum(4 * -(-len(sheet.png) // 3) for sheet in page.sheets)
    footer = element(
        "footer",
        f"This file takes {human_bytes(size)}, {human_bytes(pictures)} of it pictures. "
        "It loads nothing from anywhere.",
        class_="note",
    )
    body = element(
        "body",
        element("header", headline(page), _contents(sections)),
        main,
        footer,
        element("script", script),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _contents(sections: list[Markup | None]) -> Markup:
    """Return links to the sections, by their ids and headings."""
    links = []
    for section in sections:
        if section is not None:
            found = re.match(r'<section id="([^"]+)"><h2>(.*?)</h2>', section)
            if found is None:
                raise RuntimeError(f"render: a section must begin with its heading: {section[:60]}")
            links.append(element("a", Markup(found[2]), href=f"#{found[1]}"))
    return element("nav", *links, aria_label="On this page")


def _own(name: str) -> Markup:
    """Return a file of this package, which goes in as it is.

    Raises:
        RuntimeError: it would end its own element.
    """
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    if "</s" in text.lower():
        raise RuntimeError(f"render: {name} must not hold '</s'. It would end its own element.")
    return join(Markup(text))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
