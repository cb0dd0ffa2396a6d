"""Adapters of peft on packed folders: LoRA beside codes that stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from prequant.checkpoint import save
from prequant.passes import Canonicalize, Pipeline, QuantizeWeights, lower
from prequant.trace import trace

from ..models import FAMILIES

BERT = "bert-sequence-classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, example, _ = FAMILIES[BERT]()
    program = lower(Pipeline([Canonicalize(), QuantizeWeights(bits=4)])(trace(model, example)))
    return save(program, tmp_path_factory.mktemp("packed") / "folder")


def base_of(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_lora_trains_beside_the_codes_and_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    _, _, make_inputs = FAMILIES[BERT]()
    inputs, labels = make_inputs(6, 9), torch.arange(6) % 3
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    ours: Any = get_peft_model(base_of(folder), config)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, base_of(folder)(**inputs).logits)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = ours(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)

    ours.eval().save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(base_of(folder), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, ours(**inputs).logits)
