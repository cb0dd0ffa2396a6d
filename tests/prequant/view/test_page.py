"""The page as text: it holds the record, loads nothing, and names from models do no harm in it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from prequant.view import Record, page, write_page
from prequant.view.page import PAGE_SCRIPTS, asset

from .records import HOSTILE, bert_record, hostile_record

LOADING = {"src", "href", "action", "data", "srcset", "poster", "background", "style", "onclick", "onload", "onerror"}
"""Attributes that would fetch or run something."""


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:  # inside a script or a style
            self.texts[-1] += data

    def held_by(self, tag: str, **attributes: str) -> list[str]:
        return [
            text
            for (name, found), text in zip(self.tags, self.texts, strict=True)
            if name == tag and attributes.items() <= found.items()
        ]


def held(text: str) -> Any:
    (content,) = Elements(text).held_by("script", type="application/json")
    return json.loads(content)


def test_the_page_holds_the_whole_record() -> None:
    assert held(page(bert_record())) == bert_record().to_dict()


def test_the_page_loads_nothing() -> None:
    text = page(bert_record())
    elements = Elements(text)
    tags = {tag for tag, _ in elements.tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
    assert not [attributes for _, attributes in elements.tags if attributes.keys() & LOADING]
    style, *scripts = (asset("page.css"), *(asset(name) for name in PAGE_SCRIPTS))
    assert "@import" not in style and "url(" not in style
    for script in scripts:
        assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|\bimport\(|sendBeacon|\beval\(|new Function", script)
    # The one address is the name of SVG's elements, which nothing is loaded from.
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_the_own_script_and_style_and_nothing_else() -> None:
    elements = Elements(page(bert_record()))
    (policy,) = (str(attributes["content"]) for _, attributes in elements.tags if "http-equiv" in attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,) = elements.held_by("style")
    script = elements.held_by("script")[-1]
    for rule, content in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


def test_names_from_models_are_no_markup() -> None:
    text = page(hostile_record())
    elements = Elements(text)
    assert HOSTILE not in text
    assert [tag for tag, _ in elements.tags].count("script") == 2 and "img" not in dict(elements.tags)
    assert held(text) == hostile_record().to_dict()
    assert HOSTILE in json.dumps(held(text))


def test_parts_of_the_page_are_not_filled_in_twice() -> None:
    record = Record("%%SCRIPT%%")
    record.stages, record.nodes = bert_record().stages[:1], bert_record().nodes
    record.weights = bert_record().weights
    assert page(record).count("class Panel") == 1


def test_the_licence_of_the_layout_is_in_the_page() -> None:
    assert "Copyright (c) 2012-2014 Chris Pettitt" in page(bert_record())


def test_stages_share_what_did_not_change() -> None:
    """A page is not as many times as large as there are stages."""
    record = bert_record()
    single = max(len(stage.nodes) for stage in record.stages)
    assert len(record.stages) == 5 and len(record.nodes) < 2 * single
    assert len(record.weights) < 4 * len(record.stages[0].weights) + 1


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_page(bert_record(), tmp_path / "new" / "graph.html")
    assert path.read_text(encoding="utf-8") == page(bert_record())
    assert [file.name for file in path.parent.iterdir()] == ["graph.html"]
