"""Values can not become markup."""

import html.parser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicdiff.page.markup import Markup, coded, element, join


class Reader(html.parser.HTMLParser):
    """Collect elements, their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@given(st.text(alphabet=st.characters(exclude_characters="\r\0", exclude_categories=("Cs",))))
def test_text_and_attributes_come_back_as_they_were(value):
    read = Reader(element("p", value, title=value))
    assert read.tags == [("p", {"title": value})]
    assert read.text == value


def test_elements_nest_and_attributes_are_named():
    made = element("i", [Markup("<b>x</b>"), None, 1.5], class_="a", data_x=True, hidden=False)
    assert made == '<i class="a" data-x><b>x</b>1.5</i>'
    assert join("a<", ["&", 2]) == "a&lt;&amp;2"
    assert element("img", alt="") == '<img alt="">'
    assert element("p", 2 / 3, 3.0) == "<p>0.673</p>"


def test_void_elements_hold_nothing():
    with pytest.raises(ValueError, match="element: img must have no children, got 'x'"):
        element("img", "x")


def test_code_between_backticks():
    shown = element("p", coded("run `a <b>` or `c`, not d"))
    assert shown == "<p>run <code>a &lt;b&gt;</code> or <code>c</code>, not d</p>"
