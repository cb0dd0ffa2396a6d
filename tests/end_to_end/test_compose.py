"""The example of passes of several papers on one model, with a tiny encoder and a few steps."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification

from ..prequant.tiny import save_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "compose.py"


def test_passes_of_three_papers_and_a_recipe_on_fewer_layers(tmp_path: Path) -> None:
    model, out = save_folder(tmp_path / "model", num_hidden_layers=4), tmp_path / "out"
    words = [sys.executable, str(EXAMPLE), "--model", str(model), "--out", str(out), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("│")) > 5}
    for name, folder in (("all in one pipeline", "composed"), ("fewer layers, PreQuant", "prequant")):
        layers, accuracy, size, agrees = (cell.strip() for cell in shown[name][2:6])
        assert (layers, agrees) == ("2", "100%") and 0 <= float(accuracy) <= 1
        assert size == f"{(out / folder / 'model.safetensors').stat().st_size:,}"
        formats = AutoConfig.from_pretrained(out / folder).quantization_config["weights"].values()
        expected = {"composed": {"bcq3:row", "affine4:row"}, "prequant": {"affine4:row"}}
        assert {weight["format"] for weight in formats} == expected[folder]
        assert all("outliers" in weight for weight in formats)
    plain = AutoModelForSequenceClassification.from_pretrained(out / "shallow")
    assert plain.config.num_hidden_layers == 2 and not hasattr(plain.config, "quantization_config")
