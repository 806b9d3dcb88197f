"""What it takes to make a report again."""

from __future__ import annotations

import json

from .data import Page
from .headline import write_scale
from .markup import Markup, element
from .tables import data_table


def reproduce_section(page: Page) -> Markup:
    """Return the command, the settings, the versions and what was pruned with."""
    command = page.command or page.evaluation.setting.command
    said = (
        element("p", "This command writes the page again:", class_="caption")
        if command
        else element("p", "It was written from Python, without a command.", class_="caption")
    )
    return element(
        "section",
        element("h2", "Reproduce"),
        said,
        element("pre", element("code", command), tabindex=0) if command else None,
        data_table("How both models were sampled", ["", ""], _settings(page), texts=2),
        data_table("Versions", ["Package", "Version"], _versions(page), texts=2),
        _configurations(page),
        id="reproduce",
    )


def _settings(page: Page) -> list[list[str]]:
    setting = page.evaluation.setting
    options = ", ".join(f"{name}={json.dumps(v)}" for name, v in setting.options.items())
    rows = [
        ["dense model", setting.models.get("dense", "–")],
        ["pruned model", setting.models.get("pruned", "–")],
        ["pictures", f"{setting.num_images:,}"],
        ["guidance", ", ".join(map(write_scale, setting.guidance_scales))],
        ["steps", "as usual" if setting.steps is None else str(setting.steps)],
        ["seed", str(setting.seed)],
        ["pictures of a call", str(setting.batch_size)],
        ["device", f"{setting.device}, {setting.dtype}"],
        ["CPU threads", str(setting.threads)],
    ]
    if options:
        rows.append(["other options", options])
    if setting.reference is not None:
        count = "" if setting.reference_images is None else f" ({setting.reference_images:,})"
        rows.append(["compared with", f"{setting.reference}{count}"])
    if setting.network is not None:
        rows.append(["features", setting.network])
    return rows


def _versions(page: Page) -> list[list[str]]:
    return [[name, value] for name, value in page.evaluation.setting.versions.items()]


def _configurations(page: Page) -> list[Markup]:
    found = []
    for network in page.networks:
        of = f" {network.component}" if len(page.networks) > 1 else ""
        lines = json.dumps(dict(network.config), indent=2, sort_keys=True)
        title = element("summary", f"What{of or ' it'} was pruned with")
        found.append(element("details", title, element("pre", element("code", lines), tabindex=0)))
    return found
