import json
import math

import numpy as np
import torch

from prequant.passes import QuantizeWeights, Report
from prequant.runtime import Granularity

from .support import tiny_mlp_program


def example() -> Report:
    report = Report("toy{include=[a*]}")
    report.rewrite("first.weight", "affine4:row", sqnr=21.456789, exact=math.inf)
    report.rewrite("second.weight", "affine[x]", count=np.int64(3))
    for name in ("a", "b", "c", "d", "e"):
        report.keep(f"{name}.weight", "out of scope")
    report.keep("f.weight", "already [bold]codes")
    report.totals.update(share=torch.tensor(0.25), granularity=Granularity.ROW, names=("x", None))
    return report


def test_the_table_has_a_row_for_each_thing_and_a_column_for_each_figure() -> None:
    text = example().text()
    lines = text.splitlines()
    assert lines[0] == "toy{include=[a*]}: 2 changed, 6 kept"
    for heading in ("what", "how, or why not", "SQNR (dB)", "exact", "count"):
        assert heading in lines[2]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells[0] == ["changed", "first.weight", "affine4:row", "21.46", "inf", ""]
    assert cells[1] == ["changed", "second.weight", "affine[x]", "", "", "3"]
    assert cells[2] == ["kept", "a.weight", "out of scope", "", "", ""]
    assert cells[7] == ["kept", "f.weight", "already [bold]codes", "", "", ""]
    assert len(cells) == 8
    assert lines[-1].startswith("share 0.25, granularity row, names ['x', None]")


def test_a_brief_table_counts_what_was_kept_for_the_same_reason() -> None:
    table = example().table(brief=True)
    assert table.row_count == 4
    assert [str(cell) for cell in table.columns[1].cells][2:] == ["a.weight, b.weight, c.weight and 2 more", "f.weight"]


def test_json_has_everything() -> None:
    data = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    assert data["source"] == "toy{include=[a*]}" and data["seconds"] == 0.0
    assert data["changes"] == [
        {"what": "first.weight", "how": "affine4:row", "figures": {"sqnr": 21.456789, "exact": "inf"}},
        {"what": "second.weight", "how": "affine[x]", "figures": {"count": 3}},
    ]
    assert data["kept"][5] == {"what": "f.weight", "why": "already [bold]codes"} and len(data["kept"]) == 6
    assert data["totals"] == {"share": 0.25, "granularity": "row", "names": ["x", None]}


def test_the_report_of_a_real_pass() -> None:
    (report,) = QuantizeWeights(bits=8, exclude=("second*",))(tiny_mlp_program()).reports
    assert report.source == "quantize-weights{bits=8,exclude=[second*]}"
    assert [change.what for change in report.changes] == ["first.weight"]
    assert [(kept.what, kept.why) for kept in report.kept] == [("second.weight", "out of scope")]
    assert report.changes[0].figures["sqnr"] > 30
    json.dumps(report.to_dict(), allow_nan=False)
