"""Prompts in tables, and what each mistake is told."""

import json
import re

import pytest

from mosaicdiff.inputs.prompt_files import PromptFile, read_prompt_file
from mosaicdiff.statistics.prompts import read_prompts


def texts(path, column=None):
    return [text for _, text in read_prompt_file(path, column)]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, content, column",
    [
        ("p.json", json.dumps(["a cat", "\u00fcber, \u732b"]), None),
        ("p.JSON", json.dumps([{"x": 1, "text": "a cat"}, {"text": "\u00fcber, \u732b"}]), None),
        ("p.json", json.dumps([{"mine": "a cat"}, {"mine": "\u00fcber, \u732b"}]), "mine"),
        ("p.jsonl", '"a cat"\n\n"\u00fcber, \u732b"\n', None),
        ("p.jsonl", '{"caption": "a cat"}\n{"caption": "\u00fcber, \u732b"}', None),
        ("p.csv", 'id,prompt\n1,a cat\n2,"\u00fcber, \u732b"\n', None),
        ("p.csv", '\ufeffid,prompt,other\r\n1,x,a cat\r\n2,y,"\u00fcber, \u732b"\r\n', "other"),
        ("p.tsv", "caption\ttext\na cat\tno\n\u00fcber, \u732b\tno\n", None),
    ],
)
def test_tables_hold_prompts(tmp_path, name, content, column):
    path = write(tmp_path, name, content)
    assert texts(path, column) == ["a cat", "\u00fcber, \u732b"]
    assert read_prompts(PromptFile(path, column), "prompt").values == tuple(texts(path, column))
    if column is None:
        assert read_prompts(path, "prompt").values == ("a cat", "\u00fcber, \u732b")


def test_labels_stand_in_tables_too(tmp_path):
    path = write(tmp_path, "labels.json", '[3, "tench"]')
    assert read_prompts(path, "class_labels", classes=10, names={"tench": 7}).values == (3, 7)
    path = write(tmp_path, "labels.csv", "label\n4\n2\n")
    found = read_prompts(PromptFile(path, "label"), "class_labels", classes=10)
    assert found.values == (4, 2)


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("p.json", "[", None, "prompts must be JSON, but"),
        ("p.json", '{"a": 1}', None, "must be a JSON list of texts or objects, got dict"),
        ("p.json", "[]", None, "must hold at least one, but"),
        ("p.json", '["a", 1.5]', None, "got 1.5 (entry 1 of"),
        ("p.json", '["a", {"text": "b"}]', None, "must all be texts or all be objects"),
        ("p.json", '["a"]', "text", "the column of prompts must be left out for"),
        ("p.json", '[{"a": 1, "b": 2}]', None, "none is called prompt, caption, text, got a, b in"),
        ("p.json", '[{"text": "a"}, {"b": 2}]', None, "column 'text' of every row, got no such"),
        ("p.json", '[{"text": ["a"]}]', None, "prompts must be texts, got ['a'] (entry 0"),
        ("p.jsonl", '"a"\nnope', None, "every line must be JSON, got nope (line 2 of"),
        ("p.csv", "text\n", None, "must hold at least one, but"),
        ("p.csv", "", None, "has no rows"),
        ("p.csv", "text,x\na,1\n ,2\n", None, "'text' of every row, got an empty one (line 3 of"),
        ("p.csv", "text,x\na,1\nb, c,2\n", None, "as the header has columns, 2, got another"),
        ("p.csv", "text,x\na\n", None, "got another number (line 2 of"),
        ("p.csv", 'text\n"a" b\n', None, "must be a table, but the row after line 1 is none"),
        ("p.csv", "mine\na\n", None, "Name one (--prompt-column)"),
        ("p.csv", "text\na\n", "mine", "column 'mine' of every row, got no such column (line 2"),
        (
            "p.txt",
            "a\n",
            "text",
            "column of prompts must be left out with a .txt file, got 'tex",
        ),
    ],
)
def test_tables_that_hold_none_are_refused(tmp_path, name, content, column, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompt_file(path, column)


def test_a_table_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes("text\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8, got byte 0xe9 at byte 8 \(line 2\)"):
        read_prompt_file(path)
