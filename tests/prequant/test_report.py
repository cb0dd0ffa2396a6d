from dataclasses import replace

from prequant.passes.reports import table_text
from prequant.report import CompressionReport, ModelFigures

SETTINGS = {"model": "a [b] model", "task": "sst2", "recipe": {"recipe": "prequant"}, "threads": 3}


def figures(metric: float, size: int, latency: float) -> ModelFigures:
    return ModelFigures({"accuracy": metric, "F1": metric / 2}, size, 1000, 25, latency)


BASE, OURS = figures(0.92, 4000, 0.010), figures(0.91, 1000, 0.025)


def test_the_comparison_is_of_the_figures() -> None:
    versus = CompressionReport("accuracy", 872, BASE, OURS, [], SETTINGS).comparison()
    assert versus == {"metric": 0.91 - 0.92, "size": 4.0, "latency": 0.010 / 0.025}
    assert CompressionReport("accuracy", 872, None, OURS, [], SETTINGS).comparison() == {}


def test_sizes_as_papers_count_them_stand_beside_the_bytes() -> None:
    ours = replace(OURS, parameters=500, bits=1)
    report = CompressionReport("accuracy", 872, BASE, ours, [], SETTINGS)
    assert ours.nominal_bytes == 63 and BASE.nominal_bytes is None
    assert report.comparison()["nominal_size"] == 4 * 1000 / 63 and report.comparison()["size"] == 4.0
    (row,) = (line for line in table_text(report.table(), 100).splitlines() if "papers count" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["bytes as papers count: bits times parameters", "4,000", "63", "63.49x smaller"]


def test_the_table_says_what_is_compared_with_what() -> None:
    report = CompressionReport("accuracy", 872, BASE, OURS, [], SETTINGS)
    lines = table_text(report.table(), 80).splitlines()
    assert lines[0] == "a [b] model on sst2"
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [
        ["accuracy (872 examples)", "0.9200", "0.9100", "-0.0100"],
        ["F1 (872 examples)", "0.4600", "0.4550", "-0.0050"],
        ["bytes on disk", "4,000", "1,000", "4.00x smaller"],
        ["parameters", "1,000", "1,000", ""],
        ["trained", "25", "25", ""],
        ["share trained", "2.50%", "2.50%", ""],
        ["ms, batch of 32, 3 threads", "10.0", "25.0", "2.50x slower"],
    ]
    alone = CompressionReport("accuracy", 872, None, OURS, [], SETTINGS)
    text = table_text(alone.table(), 80)
    assert "fp32" not in text and "compressed is" not in text and "0.9100" in text
