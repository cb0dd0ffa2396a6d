"""The distance of a student from its teacher: against the same sums over what transformers' own models compute."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from prequant.distillation import COMPARED, DistillationError, Distiller, LayerMap, layer_map, soft_cross_entropy
from prequant.model import ModelProgram
from prequant.passes import DropLayers, Pipeline, Train
from prequant.trace import trace

from ..models import random_inputs, small_model

DEPTH = 4


def teacher_model(head: str = "ForSequenceClassification", **options: Any) -> Any:
    return small_model("Bert", head, num_hidden_layers=DEPTH, **options)


def traced(model: Any) -> ModelProgram:
    return cast(ModelProgram, trace(model, random_inputs(model, 2, 5)))


def pair(model: Any, keep: tuple[int, ...]) -> tuple[ModelProgram, ModelProgram]:
    original = traced(model)
    student = Pipeline([DropLayers(keep=keep), Train(head=("*",)), COMPARED])(original)
    return cast(ModelProgram, student), cast(ModelProgram, COMPARED(original))


# ---- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "published", "states"),
    [
        ([1, 3, 5], False, (1, 2, 4, 6)),
        ([1, 3, 5], True, (0, 2, 4, 6)),
        ([2, 4, 6, 8, 10], True, (1, 3, 5, 7, 9, 11)),
        ([0, 1, 2], False, (0, 1, 2, 3)),
        ([0, 1, 2], True, (0, 1, 2, 3)),
    ],
)
def test_layer_maps(kept: list[int], published: bool, states: tuple[int, ...]) -> None:
    assert layer_map(kept, published) == LayerMap(tuple(kept), states)


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [-1, 2]])
def test_a_map_of_no_layers_is_refused(kept: list[int]) -> None:
    with pytest.raises(DistillationError, match="expected numbers of the teacher's layers, in order"):
        layer_map(kept)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(4.0), 0.0]])
    expected = -(0.8 * math.log(0.25) + 0.2 * math.log(0.75)) / 2  # over two classes
    assert float(soft_cross_entropy(student, teacher)) == pytest.approx(expected, rel=1e-6)


class Seen:
    """Logits, states and scores before softmax of an eager BERT, by its own modules."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        heads, self.scores = model.config.num_attention_heads, list[Tensor]()
        made: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, output: made.__setitem__(name, output)

        hooks = []
        for number, layer in enumerate(model.bert.encoder.layer):
            for name in ("query", "key"):
                module = getattr(layer.attention.self, name)
                hooks.append(module.register_forward_hook(keep(f"{number}.{name}")))
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        self.logits, self.states = outputs.logits, outputs.hidden_states
        seen = inputs["attention_mask"][:, None, None] > 0
        for number in range(len(model.bert.encoder.layer)):
            query, key = (
                made[f"{number}.{name}"].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key")
            )
            self.scores.append((query @ key.mT / query.shape[-1] ** 0.5).where(seen, 0.0))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("keep", [(1, 3), (0, 2, 3)])
def test_the_loss_is_the_sum_over_what_transformers_computes(keep: tuple[int, ...], published: bool) -> None:
    model = teacher_model()
    small = small_model("Bert", "ForSequenceClassification", num_hidden_layers=len(keep))
    state = {name: value for name, value in model.state_dict().items() if ".layer." not in name}
    for place, number in enumerate(keep):
        own = model.bert.encoder.layer[number].state_dict()
        state |= {f"bert.encoder.layer.{place}.{name}": value * 1.1 for name, value in own.items()}
    small.load_state_dict(state)
    inputs = random_inputs(model, 3, 8, padded=True)
    layers = layer_map(keep, published)
    ours, theirs = Seen(small, inputs), Seen(model, inputs)

    def mean_square(one: Tensor, other: Tensor) -> Tensor:
        return (one.double() - other.double()).square().mean()

    logits = -(theirs.logits.softmax(-1) * ours.logits.log_softmax(-1)).mean()
    scores = sum(mean_square(ours.scores[i], theirs.scores[j]) for i, j in enumerate(layers.scores))
    states = sum(mean_square(ours.states[i], theirs.states[j]) for i, j in enumerate(layers.states))
    student, teacher = (cast(ModelProgram, COMPARED(traced(each))) for each in (small, model))
    found = Distiller(student, teacher, layers)(**inputs, labels=torch.zeros(3, dtype=torch.int64))
    parts = {"logits": logits, "attention_scores": scores, "hidden_states": states}
    for name, expected in parts.items():
        assert float(found[f"{name}_loss"]) == pytest.approx(float(expected), rel=1e-4), name
    assert float(found["loss"]) == pytest.approx(float((logits + scores + states).detach()), rel=1e-4)


def test_numbers_are_compared_by_their_squares() -> None:
    student, teacher = pair(teacher_model(num_labels=1, problem_type="regression"), (1, 3))
    inputs = random_inputs(teacher_model(), 3, 6)
    found = Distiller(student, teacher, layer_map((1, 3)))(**inputs)
    expected = (student(**inputs).logits - teacher(**inputs).logits).square().mean()
    assert float(found["logits_loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_only_the_student_trains_and_the_teacher_stays() -> None:
    student, teacher = pair(teacher_model(), (1, 3))
    before = {name: value.detach().clone() for name, value in teacher.named_parameters()}
    distiller = Distiller(student, teacher, layer_map((1, 3)))
    assert {name for name, _ in distiller.named_parameters()} == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    inputs, losses = random_inputs(teacher_model(), 4, 7), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = distiller(**inputs)["loss"]
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_a_student_of_all_layers_is_no_distance_away_but_for_its_classes_entropy() -> None:
    student, teacher = pair(teacher_model(), (0, 1, 2, 3))
    inputs = random_inputs(teacher_model(), 3, 6, padded=True)
    found = Distiller(student, teacher, layer_map(range(4)))(**inputs)
    assert float(found["hidden_states_loss"]) == float(found["attention_scores_loss"]) == 0.0
    shares = teacher(**inputs).logits.softmax(-1)
    assert float(found["logits_loss"]) == pytest.approx(float(-(shares * shares.log()).mean()), rel=1e-5)


def test_maps_that_do_not_fit_are_refused() -> None:
    student, teacher = pair(teacher_model(), (1, 3))
    with pytest.raises(DistillationError, match=r"the student has .*; the map is for 1 layers"):
        Distiller(student, teacher, layer_map((1,)))
    with pytest.raises(DistillationError, match=r"goes with the teacher's hidden_states.10, which .* not expose"):
        Distiller(student, teacher, layer_map((1, 9)))
