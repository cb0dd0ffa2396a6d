"""``torch.compile(model, backend="prequant")`` on models that know nothing of prequant."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.compiling import Options
from prequant.compiling.lifted import CompileError
from prequant.passes import Pipeline
from prequant.runtime import PrequantError, Quantizer
from prequant.trace import trace

from ..models import FAMILIES, small_model

BERT = "bert-sequence-classification"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the weights that were quantized."""
    seen: list[Any] = []
    original = Quantizer.__call__

    def call(self: Quantizer, weight: Tensor) -> Any:
        seen.append(weight.shape)
        return original(self, weight)

    monkeypatch.setattr(Quantizer, "__call__", call)
    return seen


def compiled(model: nn.Module, dynamic: bool | None = True, **options: Any) -> Any:
    return torch.compile(model, backend="prequant", fullgraph=True, dynamic=dynamic, options=options or None)


def inputs_of(name: str, length: int) -> dict[str, Any]:
    cached = {} if name.startswith(("bert", "albert")) else {"use_cache": False}
    return {**FAMILIES[name]().make_inputs(2, length), **cached}


@pytest.mark.parametrize("options", [{}, {"recipe": "w8"}, {"recipe": "w3a8"}, {"recipe": "w1"}], ids=str)
@pytest.mark.parametrize("dynamic", [True, None])
def test_it_computes_what_the_pipeline_makes_of_the_model(options: dict[str, Any], dynamic: bool | None) -> None:
    model, example, _ = FAMILIES[BERT]()
    wanted = Pipeline.parse(Options.of(options).passes)(trace(model, example))
    ours = compiled(model, dynamic, **options)
    with torch.no_grad():
        for length in (5, 9, 12):
            inputs = inputs_of(BERT, length)
            found = ours(**inputs)
            assert type(found) is type(model(**inputs))
            torch.testing.assert_close(found.logits, wanted(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "t5-seq2seq-lm", "llama-causal-lm", "albert-masked-lm"])
def test_other_families(name: str) -> None:
    model, example, _ = FAMILIES[name]()
    wanted = Pipeline.parse(Options(recipe="w8").passes)(trace(model, example))
    ours = compiled(model, recipe="w8", rest="eager")
    with torch.no_grad():
        for length in (5, 9):
            inputs = inputs_of(name, length)
            found = ours(**inputs).logits
            inputs.pop("use_cache", None)
            torch.testing.assert_close(found, wanted(**inputs).logits, rtol=1e-3, atol=1e-3)


def test_what_is_not_compressed_goes_on_to_inductor() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(16, 8), nn.Conv1d(1, 1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.linear(x).cumsum(-1).unsqueeze(1)).erf()

    torch.manual_seed(0)
    model = Mixed().eval()
    by_inductor, as_it_is = compiled(model, recipe="w8"), compiled(copy.deepcopy(model), recipe="w8", rest="eager")
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(by_inductor(x), as_it_is(x), rtol=1e-4, atol=1e-5)
            assert not torch.equal(as_it_is(x), model(x))


def test_weights_are_quantized_once(quantized: list[Any]) -> None:
    """Also where a size that was fixed turns out to be dynamic, and with gradients."""
    ours = compiled(small_model("Bert", "ForMaskedLM"), dynamic=None)
    with torch.no_grad():
        ours(**inputs_of(BERT, 5))
        count = len(quantized)
        assert count > 6
        for length in (5, 9, 12):
            ours(**inputs_of(BERT, length))
    assert len(quantized) == count


def test_other_weights_are_quantized_anew(quantized: list[Any]) -> None:
    model = small_model("Bert", "ForSequenceClassification")
    with torch.no_grad():
        before = compiled(model, recipe="w8")(**inputs_of(BERT, 5)).logits
        count = len(quantized)
        model.classifier.weight.mul_(2)
        torch._dynamo.reset()
        after = compiled(model, recipe="w8")(**inputs_of(BERT, 5)).logits
    assert len(quantized) == 2 * count
    torch.testing.assert_close(
        after - model.classifier.bias, 2 * (before - model.classifier.bias), rtol=1e-3, atol=1e-3
    )


class Shifted(nn.Module):
    """With a buffer, and constants of its own in each of its two graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        factors = torch.tensor([1.0, 2.0]) if flag else torch.tensor([100.0, 200.0])
        return self.linear(x) * factors.repeat(4) + self.shift


def test_graphs_over_the_same_weights_have_constants_of_their_own() -> None:
    model, x = Shifted().eval(), torch.ones(3, 8)
    ours = compiled(model, recipe="w8", rest="eager")
    with torch.no_grad():
        for flag in (True, False):
            torch.testing.assert_close(ours(x, flag), model(x, flag), rtol=2e-2, atol=1.0)


def test_a_buffer_that_was_replaced_is_not_overlooked() -> None:
    model: Any = Shifted().eval()
    x = torch.ones(3, 8)
    ours = compiled(model, recipe="w8", rest="eager")
    with torch.no_grad():
        before = ours(x)
        model.shift.fill_(1.0)
        torch.testing.assert_close(ours(x), before + 1)
        model.shift = torch.full((8,), 5.0)
        with pytest.raises(CompileError, match="shift is another tensor than when the model was compiled"):
            ours(x)
        torch.compiler.reset()
        again = compiled(model, recipe="w8", rest="eager")
        torch.testing.assert_close(again(x), before + 5)


@pytest.mark.parametrize("rest", ["inductor", "eager"])
def test_gradients_reach_the_inputs(rest: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    x, twin = (torch.linspace(-1, 1, 5 * 24).view(5, 24).requires_grad_() for _ in range(2))
    wanted = Pipeline.parse(Options(recipe="w8").passes)(trace(model, [x]))
    compiled(model, recipe="w8", rest=rest)(x).square().sum().backward()
    wanted(twin).square().sum().backward()
    assert x.grad is not None and twin.grad is not None
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "w9"}, "recipe='w9': expected w1 to w8"),
        ({"recipe": 4}, "recipe=4: expected text"),
        ({"pipeline": ["lower"]}, r"pipeline=\['lower'\]: expected text"),
        ({"recipe": "w4", "pipeline": "canonicalize"}, "give one of them"),
        ({"rest": "tvm"}, "rest='tvm': expected inductor or eager"),
        ({"recipes": "w4"}, "no option 'recipes'.*recipe"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        Options.of(options)


def test_a_pipeline_as_text() -> None:
    model, example, _ = FAMILIES[BERT]()
    text = "canonicalize,split-outliers{ratio=0.01},quantize-weights{bits=3},lower"
    wanted = Pipeline.parse(text)(trace(model, example))
    with torch.no_grad():
        found = compiled(model, pipeline=text)(**inputs_of(BERT, 9)).logits
        torch.testing.assert_close(found, wanted(**inputs_of(BERT, 9)).logits, rtol=1e-4, atol=1e-4)


def test_a_model_in_train_mode_is_refused() -> None:
    model = copy.deepcopy(FAMILIES[BERT]().model).train()
    with pytest.raises(Exception, match="the model is in train mode") as caught:
        compiled(model)(**inputs_of(BERT, 5))
    assert isinstance(getattr(caught.value, "inner_exception", None), PrequantError)


def test_numbers_that_are_no_sizes_are_refused() -> None:
    linear = nn.Linear(4, 4)

    def scaled(x: Tensor, count: int) -> Tensor:
        return linear(x) * count

    with torch.no_grad(), pytest.raises(Exception, match="neither a tensor nor the size of one"):
        compiled(scaled)(torch.ones(2, 4), 3)  # type: ignore[arg-type]


def test_it_is_found_by_its_name_alone(tmp_path: Path) -> None:
    code = """
import sys, torch
model = torch.nn.Linear(64, 8).eval()
assert "prequant" not in sys.modules
ours = torch.compile(model, backend="prequant", options={"recipe": "w8"})
with torch.no_grad():
    x = torch.randn(3, 64)
    found, wanted = ours(x), model(x)
assert 0 < (found - wanted).abs().max() < 0.05, (found, wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
