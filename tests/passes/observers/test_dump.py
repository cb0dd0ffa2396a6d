from pathlib import Path

import pytest

from prequant.passes import Dump, PassError, Pipeline, QuantizeWeights, readable
from prequant.runtime import PrequantError

from ..support import tiny_mlp_program
from ..toys import FailAt, Nothing


def test_each_pass_leaves_its_texts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    program = tiny_mlp_program()
    result = Pipeline([Nothing(), QuantizeWeights(bits=4, exclude=("second*",))])(program, [Dump(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "01-nothing.after.txt",
        "01-nothing.before.txt",
        "01-nothing.diff",
        "01-nothing.report.txt",
        "02-quantize-weights.after.txt",
        "02-quantize-weights.before.txt",
        "02-quantize-weights.diff",
        "02-quantize-weights.report.txt",
    ]
    assert (folder / "01-nothing.before.txt").read_text() == readable(program) + "\n"
    assert (folder / "01-nothing.diff").read_text() == ""
    assert (folder / "02-quantize-weights.before.txt").read_text() == readable(program) + "\n"
    assert (folder / "02-quantize-weights.after.txt").read_text() == readable(result) + "\n"
    difference = (folder / "02-quantize-weights.diff").read_text().splitlines()
    assert difference[:2] == ["--- 02-quantize-weights.before.txt", "+++ 02-quantize-weights.after.txt"]
    changed = [line for line in difference[2:] if line[0] in "+-"]
    assert [line[:14] for line in changed] == ["-  %linear = l", "+  %dequantize", "+  %linear = l"]
    report = (folder / "02-quantize-weights.report.txt").read_text()
    assert report.startswith("quantize-weights{exclude=[second*]}: 1 changed, 1 kept") and "out of scope" in report


def test_a_second_dump_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "01-notes.txt").write_text("mine too")
    Pipeline([Nothing(), Nothing(), Nothing()])(tiny_mlp_program(), [Dump(tmp_path)])
    Pipeline([QuantizeWeights()])(tiny_mlp_program(), [Dump(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "01-notes.txt",
        "01-quantize-weights.after.txt",
        "01-quantize-weights.before.txt",
        "01-quantize-weights.diff",
        "01-quantize-weights.report.txt",
        "notes.txt",
    ]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failing_pass_leaves_the_text_before_and_the_error(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline([FailAt()])(tiny_mlp_program(), [Dump(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-fail-at.before.txt", "01-fail-at.error.txt"]
    assert "out of luck (at second.weight)" in (tmp_path / "01-fail-at.error.txt").read_text()


def test_a_file_that_can_not_be_put_in_place_leaves_no_half(tmp_path: Path) -> None:
    (tmp_path / "01-nothing.report.txt").mkdir()
    (tmp_path / "01-nothing.report.txt" / "full").write_text("")
    with pytest.raises(PassError, match=r"Dump .*it: .*Error"):
        Pipeline([Nothing()])(tiny_mlp_program(), [Dump(tmp_path)])
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrequantError, match=r"can't dump into .*file: it is not a folder"):
        Dump(tmp_path / "file")
