"""The pictures of both models, to be looked at side by side, through a slider or by flipping."""

from __future__ import annotations

import base64
import json

from .data import Page, Sheet
from .headline import chosen_metric, write_metric, write_scale
from .markup import Markup, element, join

#: Pictures up to this wide are enlarged pixel by pixel.
_TINY = 64
_VIEWS = (("side", "Side by side"), ("slider", "Slider"), ("flip", "Flip"))


def pictures_section(page: Page) -> Markup:
    """Return the sheets of every guidance, with what drives the comparison."""
    setting = page.evaluation.setting
    scales = setting.guidance_scales
    sheets = {(sheet.model, sheet.guidance): sheet for sheet in page.sheets}
    first = page.sheets[0]
    conditions = [str(value) for value in setting.conditions[: first.count]]
    kind = "class" if setting.condition_kind == "class_labels" else "prompt"
    pairs = [
        _pair(page, index, (sheets["dense", scale], sheets["pruned", scale]))
        for index, scale in enumerate(scales)
    ]
    viewer = element(
        "div",
        _controls(page, first.count),
        *pairs,
        _chosen(),
        class_="viewer tiny" if max(first.cell) <= _TINY else "viewer",
        data_columns=first.columns,
        data_rows=-(-first.count // first.columns),
        data_count=first.count,
        data_cell=f"{first.cell[0]} / {first.cell[1]}",
        data_kind=kind,
        data_conditions=json.dumps(conditions),
    )
    return element(
        "section",
        element("h2", "Pictures"),
        element("p", _about(page, first), class_="caption"),
        viewer,
        id="pictures",
    )


def _about(page: Page, sheet: Sheet) -> str:
    setting = page.evaluation.setting
    shown = (
        "All pictures"
        if sheet.count == setting.num_images
        else f"The first {sheet.count} of {setting.num_images:,} pictures"
    )
    said = [
        f"{shown} of each model. Pictures at the same place began from the same noise and the "
        "same condition, so that whatever differs is due to pruning."
    ]
    if sheet.frame is not None:
        said.append(f"Of each video, frame {sheet.frame + 1}.")
    if sheet.shrunk_from is not None:
        width, height = sheet.shrunk_from
        said.append(
            f"Shown smaller than they were sampled ({width} × {height} pixels): fine detail can "
            "not be judged here."
        )
    return " ".join(said)


def _pair(page: Page, index: int, both: tuple[Sheet, Sheet]) -> Markup:
    scale = both[0].guidance
    several = len(page.evaluation.setting.guidance_scales) > 1
    heading = element("h3", f"Guidance {write_scale(scale)}") if several else None
    figures = [_sheet(page, sheet) for sheet in both]
    slider = element(
        "input",
        type="range",
        class_="cut",
        min=0,
        max=100,
        value=50,
        step=1,
        hidden=True,
        aria_label="Where dense ends and pruned begins, in percent of the width",
    )
    flip = element(
        "button", "Show pruned", type="button", class_="flip", aria_pressed="false", hidden=True
    )
    return element(
        "div",
        heading,
        element("div", *figures, class_="both"),
        slider,
        flip,
        class_="pair",
        data_pair=index,
    )


def _sheet(page: Page, sheet: Sheet) -> Markup:
    evaluation = page.evaluation
    row = evaluation.row(sheet.model, sheet.guidance)
    metric = chosen_metric(evaluation)
    name = sheet.model.capitalize()
    value = "" if metric is None else row.metrics.get(metric.name)
    told = (
        ""
        if metric is None or value is None or value == ""
        else f"{metric.title} {write_metric(metric, float(value))}"
    )
    rows = -(-sheet.count // sheet.columns)
    image = element(
        "img",
        src=f"data:image/png;base64,{base64.b64encode(sheet.png).decode('ascii')}",
        width=sheet.columns * sheet.cell[0],
        height=rows * sheet.cell[1],
        alt=f"{sheet.count} pictures of the {sheet.model} model in {rows} rows of "
        f"{sheet.columns}, guidance {write_scale(sheet.guidance)}",
    )
    return element(
        "figure",
        element("figcaption", element("b", name), element("span", told) if told else None),
        element("div", image, class_="sheet"),
        class_=f"of-{sheet.model}",
    )


def _controls(page: Page, count: int) -> Markup:
    """Return the controls, which the script shows: without it they would do nothing."""
    radios = [
        element(
            "label",
            element("input", type="radio", name="view", value=value, checked=value == "side"),
            element("span", title),
        )
        for value, title in _VIEWS
    ]
    scales = page.evaluation.setting.guidance_scales
    choice = None
    if len(scales) > 1:
        options = [
            element("option", write_scale(scale), value=index, selected=index == _start(page))
            for index, scale in enumerate(scales)
        ]
        choice = element(
            "label", "Guidance ", element("select", *options, name="guidance", autocomplete="off")
        )
    return element(
        "div",
        element("fieldset", element("legend", "View"), *radios, class_="views"),
        choice,
        element(
            "label",
            "Picture ",
            element("input", type="number", name="picture", min=1, max=count, value=1,
                    autocomplete="off"),
            f" of {count}",
        ),
        class_="controls",
        hidden=True,
    )  # fmt: skip


def _start(page: Page) -> int:
    """Return the guidance to show first: the best of the dense model."""
    pair = page.evaluation.best_pair
    return (
        0 if pair is None else page.evaluation.setting.guidance_scales.index(pair[0].guidance_scale)
    )


def _chosen() -> Markup:
    """Return the places of one picture, enlarged, which the script fills."""
    names = ("Dense", "Pruned", "Difference")
    crops = [
        element(
            "figure",
            element("div", class_=f"crop {name.lower()}"),
            element("figcaption", name),
        )
        for name in names
    ]
    return element(
        "div",
        element("p", class_="which", aria_live="polite"),
        join(element("div", *crops, class_="crops")),
        class_="chosen",
        hidden=True,
    )
