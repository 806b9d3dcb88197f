"""Tables that scroll within their own box where the page is narrow."""

from __future__ import annotations

from collections.abc import Sequence

from .markup import Child, Markup, element


def data_table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    texts: int = 1,
    classes: Sequence[str] | None = None,
) -> Markup:
    """Return a table; the first cell of a row names it.

    Args:
        caption: what the table says, above it.
        columns: titles.
        rows: cells, as many as there are columns.
        texts: how many columns from the left are text; the others are numbers, set right.
        classes: of each row.

    Raises:
        ValueError: a row has another number of cells.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"data_table: rows must have {len(columns)} cells, as many as columns, got "
                f"{len(row)}."
            )

    def place(index: int) -> str | None:
        return None if index < texts else "number"

    head = [element("th", t, scope="col", class_=place(k)) for k, t in enumerate(columns)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=place(0)),
            *(element("td", cell, class_=place(k)) for k, cell in enumerate(row[1:], 1)),
            class_=(classes[index] or None) if classes else None,
        )
        for index, row in enumerate(rows)
    ]
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    # Reached by the Tab key, so that the arrow keys can scroll it.
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)
