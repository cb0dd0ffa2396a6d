"""Pictures: well-formed, with the boxes that are open, and with hostile names as text."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import quickjs

from prequant.view import COLOURINGS, PictureError, Record, record_of, write_picture
from prequant.view.dot import dot, quoted
from prequant.view.page import scripts
from prequant.view.pictures import check_format
from prequant.view.scene import scene

from ...models import traced
from .records import HOSTILE, bert_record, deep_record, hostile_record

PNG = b"\x89PNG\r\n\x1a\n"


def drawn(record: Record, folder: Path, **options: object) -> ET.Element:
    return ET.parse(write_picture(record, folder / "graph.svg", "svg", **options)).getroot()  # type: ignore[arg-type]


def words(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.text]


def test_an_svg_shows_the_blocks_and_their_totals(tmp_path: Path) -> None:
    shown = words(drawn(bert_record(), tmp_path))
    assert {"tiny", "bert", "embeddings", "layer.0", "pooler", "classifier", "output"} <= {
        word.split(" · ")[0] for word in shown
    }
    assert "bits stored per weight, all told" in shown


@pytest.mark.parametrize("colouring", COLOURINGS)
def test_every_colouring_has_its_legend(colouring: str, tmp_path: Path) -> None:
    root = drawn(bert_record(), tmp_path, colouring=colouring)
    fills = {element.get("fill") for element in root.iter() if element.tag.endswith("rect")}
    legend = scene(bert_record(), colouring, None)["legend"]
    assert len(legend) >= 5 and {colour for colour, _, _ in legend} <= fills


def test_depth_opens_levels() -> None:
    counts = [len(scene(bert_record(), "bits", depth)["boxes"]) for depth in (0, 1, 2, 9)]
    assert counts == sorted(counts) and counts[0] < counts[2] < counts[3]
    whole = scene(bert_record(), "bits", 9)
    assert not [box for box in whole["boxes"] if box["type"] == "block"]
    ops = [box for box in whole["boxes"] if box["type"] == "op"]
    record = bert_record()
    nodes = [record.nodes[place] for place in record.stages[-1].nodes]
    assert len(ops) == sum(node.kind == "op" and node.data for node in nodes)


def test_boxes_lie_within_the_picture_and_do_not_overlap() -> None:
    """Blocks and ops; frames hold others."""
    found = scene(bert_record(), "bits", 9)
    boxes = [box for box in found["boxes"] if box["type"] != "frame"]
    for place, box in enumerate(boxes):
        assert box["x"] >= 0 and box["x"] + box["w"] <= found["width"] and box["y"] + box["h"] <= found["height"]
        for other in boxes[:place]:
            apart = box["x"] >= other["x"] + other["w"] or other["x"] >= box["x"] + box["w"]
            assert apart or box["y"] >= other["y"] + other["h"] or other["y"] >= box["y"] + box["h"]


def test_what_all_layers_read_is_named_beside_them_instead_of_a_fan_of_lines() -> None:
    found = scene(deep_record(), "bits", None)
    layers = [box for box in found["boxes"] if re.fullmatch(r"h\.\d+", box["label"])]
    assert len(layers) == 24 and all(layer["asides"] for layer in layers)
    assert len(found["lines"]) < 3 * len(found["boxes"])


def test_layers_within_layers_stay_closed() -> None:
    """T5's blocks hold numbered layers themselves."""
    found = scene(record_of(traced("t5-encoder")), "bits", None)
    closed = [box["label"] for box in found["boxes"] if box["type"] == "block"]
    assert {"block.0", "block.1"} <= set(closed) and not [label for label in closed if label.startswith("layer.")]


def test_cells_show_the_bytes_of_weights_even_where_an_op_before_makes_their_values() -> None:
    """Then a linear reads its bias alone."""
    record = bert_record()
    simulated = replace(record, stages=record.stages[:4])
    assert simulated.stages[-1].title == "quantize-weights"
    fills = {}
    for which in (simulated, record):
        (layer,) = (box for box in scene(which, "bytes", None)["boxes"] if box["label"] == "layer.0")
        fills[len(which.stages)] = [cell["fill"] for cell in layer["cells"]]
    for query, key, _, _, up, down in fills.values():
        assert query == key and up != query and down != query
    (large,) = {len(set(cells)) for cells in fills.values()}
    assert large == 3  # 32 × 32, 48 × 32 and 32 × 48 weights


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    content = write_picture(bert_record(), tmp_path / "graph.png", "png").read_bytes()
    assert content.startswith(PNG)
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    root = ET.parse(write_picture(bert_record(), tmp_path / "graph.svg", "svg")).getroot()
    assert (width, height) == (2 * int(str(root.get("width"))), 2 * int(str(root.get("height"))))


def test_hostile_names_are_text_in_an_svg(tmp_path: Path) -> None:
    root = drawn(hostile_record(), tmp_path)
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        *("svg", "defs", "marker", "path", "rect", "text", "tspan", "g", "circle")
    }
    assert HOSTILE in words(root)


def test_dot_has_every_node_and_edge() -> None:
    record = bert_record()
    text = dot(record)
    nodes = [record.nodes[place] for place in record.stages[-1].nodes if record.nodes[place].data]
    assert len(re.findall(r'^ +"\w+" \[label=', text, re.MULTILINE)) == len(nodes)
    names = {node.name for node in nodes}
    edges = {(source, node.name) for node in nodes for source in node.inputs if source in names}
    assert set(re.findall(r'^  "(\w+)" -> "(\w+)";$', text, re.MULTILINE)) == edges
    assert 'subgraph "cluster_bert.encoder.layer.0" {' in text and "affine4:row" in text
    assert text.count("{") == text.count("}")


def test_dot_quotes_what_is_hostile() -> None:
    assert quoted('a"; b [label="c\\') == '"a\\"; b [label=\\"c\\\\"'
    assert quoted("line\nbreak") == '"line break"'
    record = bert_record()
    hostile = Record('x" { evil', modules=record.modules, nodes=record.nodes, weights=record.weights)
    hostile.stages = record.stages
    assert dot(hostile).startswith('digraph "x\\" { evil" {\n')


@pytest.mark.parametrize(
    ("format", "colour", "message"),
    [
        ("gif", "bits", "the format 'gif' is not known: it is one of html, svg, png, dot"),
        ("svg", "mood", "the colour 'mood' is not known: it is one of bits, weights, values, bytes, time"),
    ],
)
def test_what_is_not_known_is_refused(format: str, colour: str, message: str) -> None:
    with pytest.raises(PictureError) as caught:
        check_format(format, colour)
    assert str(caught.value) == message


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        PictureError, match=r"png takes the extra: pip install 'prequant\[pictures\]' \(quickjs is missing"
    ):
        check_format("png", "bits")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("formatSeconds(9.2e-4)", "920 µs"),
        ("formatSeconds(9.4e-6)", "9.4 µs"),
        ("formatSeconds(0.9996)", "1000 ms"),
        ("formatBytes(999999)", "1000 kB"),
        ("formatBytes(73728)", "73.7 kB"),
        ("significant(-1234.5, 3)", "-1235"),
        ("significant(0.012345, 3)", "0.0123"),
    ],
)
def test_numbers_are_written_without_exponents(call: str, text: str) -> None:
    context = quickjs.Context()
    context.eval(scripts(("colours.js",)))
    assert context.eval(call) == text
