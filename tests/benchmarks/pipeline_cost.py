"""What tracing and a four-pass pipeline cost on the shape of BERT-base: seconds and peak memory.

python tests/benchmarks/pipeline_cost.py
"""

import time

import torch
from results_file import write  # type: ignore[import-not-found]
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification

import prequant as pq
from prequant.measure import PeakMemory
from prequant.passes import Observer, Pipeline, Program, Report, Step

PIPELINE = "canonicalize,split-outliers{ratio=0.005},quantize-weights{bits=4},lower"


class Stopwatch(Observer):
    """Seconds and the peak of resident memory, pass by pass."""

    innermost = True

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def before(self, step: Step, program: Program) -> None:
        self.memory = PeakMemory().__enter__()
        self.started = time.perf_counter()

    def after(self, step: Step, program: Program, report: Report) -> None:
        seconds = time.perf_counter() - self.started
        self.memory.__exit__(None, None, None)
        self.rows.append((step.pass_.name, seconds, self.memory.bytes))

    def failed(self, step: Step, program: Program, error: BaseException) -> None:
        self.memory.__exit__(None, None, None)


def main() -> None:
    # One small trace first: what the process loads on its first use is not the model's.
    small = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    )
    inputs = {"input_ids": torch.ones(2, 16, dtype=torch.int64), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    Pipeline.parse(PIPELINE)(pq.trace(small.eval(), inputs))
    del small

    with PeakMemory() as idle:
        pass
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    started = time.perf_counter()
    with PeakMemory() as tracing:
        program = pq.trace(model, inputs)
    rows = [("trace", time.perf_counter() - started, tracing.bytes)]
    del model
    watch = Stopwatch()
    started = time.perf_counter()
    with PeakMemory() as whole:
        compressed = Pipeline.parse(PIPELINE)(program, [watch])
    total = time.perf_counter() - started
    rows += watch.rows
    peak = max(tracing.bytes, whole.bytes)
    table = [
        {"step": name, "seconds": f"{seconds:.2f}", "peak over the model's size": f"{(memory - idle.bytes) / size:.2f}"}
        for name, seconds, memory in [*rows, ("all", total + rows[0][1], peak)]
    ]
    packed = sum(t.numel() * t.element_size() for t in (*compressed.parameters(), *compressed.buffers()))
    notes = f"""
BertForSequenceClassification at BERT-base's shape, random weights: {sum(p.numel() for p in program.parameters()):,}
parameters, {size:,} bytes; {packed:,} bytes packed. `{PIPELINE}`, one run in a fresh process.
"Peak over the model's size" is the largest resident memory while the step ran, less what the process had before the
model was made, over the model's bytes; the float model itself, which stays alive beside the result, is 1.
"""
    path = write(
        "pipeline_cost",
        "Cost of tracing and compressing BERT-base",
        ["python", "tests/benchmarks/pipeline_cost.py"],
        notes,
        {"Steps": table},
    )
    Console().print(path.read_text())


if __name__ == "__main__":
    main()
