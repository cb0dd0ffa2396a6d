import copy
import dataclasses
import math
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from prequant.passes import Pipeline, Program, QuantizeWeights, SplitOutliers, Train, lower
from prequant.recipes import PreQuant
from prequant.runtime import PrequantError
from prequant.sources import canonical_program, head_parameters
from prequant.training import TrainingError, TrainingResult, TrainingSettings, finetune, parameter_groups
from prequant.training.precision import Precision, collator_for

from .tiny import collator, encoded, make_model, make_program, make_tokenizer

QUICK = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def program_of(model: Any, original: Program | None = None, **options: Any) -> Program:
    """The model after stage 1 of PreQuant; ``original`` is its Program, if it has been traced."""
    original = canonical_program(model, make_tokenizer()) if original is None else original
    return PreQuant(**options).prepare(original, head_parameters(model))(original)


def run(model: nn.Module, settings: TrainingSettings = QUICK, collate: Any = None, **options: Any) -> TrainingResult:
    return finetune(model, encoded(), collate or collator(), settings, progress=False, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- what it computes ------------------------------------------------------------------------------------------------


class Seen:
    """A collator that keeps the token ids of every batch, without padding."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.batches.append([list(row["input_ids"]) for row in rows])
        return collator()(rows)


def test_training_is_adamw_with_warmup_clipping_and_decay_as_the_settings_say() -> None:
    """Against a loop written out here, over the batches that were seen; without dropout, there is no chance in it."""
    settings = TrainingSettings(
        epochs=2,
        batch_size=5,
        learning_rate=3e-3,
        head_learning_rate=7e-3,
        weight_decay=0.1,
        warmup=0.3,
        max_grad_norm=0.5,
    )
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = copy.deepcopy(model)
    collate = Seen()
    result = run(ours, settings, collate, head=("classifier.weight", "classifier.bias"))

    rows, tokenizer = encoded(), make_tokenizer()
    labels = {tuple(row["input_ids"]): row["labels"] for row in rows}
    plain = [n for n, _ in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    names = {name: p for name, p in model.named_parameters()}
    groups = [
        {
            "params": [p],
            "lr": 7e-3 if name.startswith("classifier") else 3e-3,
            "weight_decay": 0.0 if name in plain else 0.1,
        }
        for name, p in names.items()
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = 2 * math.ceil(len(rows) / 5)
    assert result.steps == len(collate.batches) == steps
    losses = []
    for step, batch in enumerate(collate.batches):
        warmup = math.ceil(0.3 * steps)
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        model.train()
        loss = model(**inputs, labels=torch.tensor([labels[tuple(ids)] for ids in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, names[name], rtol=1e-5, atol=1e-6)
    assert result.loss == pytest.approx(sum(losses) / steps, rel=1e-5)


@pytest.mark.parametrize("kind", ["eager", "program"])
def test_without_dropout_nothing_is_dropped_and_the_mode_is_free_again(kind: str) -> None:
    def trained(dropout: bool, **config: Any) -> dict[str, Tensor]:
        model = make_model(**config) if kind == "eager" else program_of(make_model(**config), make_program(**config))
        run(model, dataclasses.replace(QUICK, dropout=dropout))
        assert model.train().training and not model.eval().training and "train" not in vars(model)
        return state(model)

    never = trained(True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert same(trained(False), never) and not same(trained(True), never)


def test_an_eager_model_and_a_program_see_the_same_batches_in_the_same_order() -> None:
    eager, compressed, other = Seen(), Seen(), Seen()
    run(make_model(), collate=eager)
    run(program_of(make_model(), make_program()), collate=compressed)
    batches = compressed.batches
    assert batches == eager.batches and len(batches) == 6
    for epoch in (batches[:3], batches[3:]):
        assert sorted(ids for batch in epoch for ids in batch) == sorted(map(list, encoded()["input_ids"]))
    assert batches[:3] != batches[3:]
    run(make_model(), TrainingSettings(epochs=2, batch_size=8, seed=7), other)
    assert other.batches != batches


@pytest.mark.parametrize("kind", ["eager", "program"])
def test_a_seed_gives_the_same_weights_whatever_ran_before(kind: str) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        model = make_model() if kind == "eager" else program_of(make_model(), make_program())
        run(model, TrainingSettings(epochs=1, batch_size=8, learning_rate=1e-2, seed=seed))
        return state(model)

    first = trained(1)
    torch.rand(1000)
    other = trained(2)
    torch.manual_seed(99)
    assert same(first, trained(1))
    assert not same(first, other)


def test_steps_are_epochs_or_as_many_as_asked() -> None:
    assert run(make_model(), TrainingSettings(epochs=1.5, batch_size=10)).steps == math.ceil(1.5 * 3)
    assert run(make_model(), TrainingSettings(epochs=9, batch_size=10, max_steps=2)).steps == 2


# ---- what it leaves alone --------------------------------------------------------------------------------------------


def test_freed_memory_goes_back_to_the_system_on_the_way() -> None:
    """A heap with holes between what stays would grow with every batch of another length."""
    resident, before = psutil.Process().memory_info, list[int]()

    def leave_holes() -> None:
        pieces = [torch.ones(1 << 13) for _ in range(4000)]  # 32 kB each, which come from the heap
        before.append(resident().rss)
        kept.extend(pieces[::100])

    kept: list[Tensor] = []
    run(make_model(), dataclasses.replace(QUICK, max_steps=16), after_step=lambda: None if before else leave_holes())
    assert resident().rss < before[0] - 64e6 and len(kept) == 40


def test_training_a_program_changes_only_what_trains_and_no_tensor_it_shares() -> None:
    model = make_model()
    original = canonical_program(model, make_tokenizer())
    before = state(model)
    # Not the biases: that of attention's keys has no gradient, as softmax sees no difference.
    recipe = PreQuant(train=("outliers", "head", "layer-norms"))
    program = recipe.prepare(original, head_parameters(model))(original)
    untrained = state(program)
    run(program)
    assert same(before, state(model)) and same(state(original), before | state(original))
    trainable = {name for name, p in program.named_parameters() if p.requires_grad}
    changed = {name for name, value in state(program).items() if not torch.equal(value, untrained[name])}
    assert changed == trainable
    assert {name.rpartition(".")[2] for name in untrained.keys() - trainable} >= {"codes", "scale", "columns"}


def test_the_configuration_is_as_before_and_the_model_evaluates() -> None:
    models: list[Any] = [make_model(), make_model("GPT2", pad_token_id=0), program_of(make_model(), make_program())]
    for model in models:
        model.train()
        before = model.config.to_dict()
        run(model, TrainingSettings(max_steps=1))
        assert model.config.to_dict() == before
        assert not model.training
        inputs = make_tokenizer()(["a fine day"], return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("progress", [False, True])
def test_nothing_is_printed_but_the_bar(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    finetune(make_model(), encoded(), collator(), TrainingSettings(max_steps=2), progress=progress)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert ("2/2" in printed.err) == progress
    assert "loss" not in printed.err and (progress or printed.err == "")


# ---- the best state --------------------------------------------------------------------------------------------------


def test_the_best_of_the_states_that_are_scored_stays() -> None:
    """Steps 2, 4 and the last, 5; the second of equal scores is not better."""
    settings = dataclasses.replace(QUICK, max_steps=5, eval_steps=2, dropout=False)
    seen, model = list[dict[str, Tensor]](), make_model()

    def watch() -> float:
        seen.append(state(model))
        return 0.0

    run(model, settings, evaluate=watch)
    for scores, best in (([0.1, 0.3, 0.2], 4), ([0.5, 0.3, 0.5], 2), ([0.1, 0.2, 0.3], 5)):
        other, given = make_model(), iter(scores)
        result = run(other, settings, evaluate=given.__next__)
        assert (result.best_step, result.steps) == (best, 5) and next(given, None) is None
        assert same(state(other), seen[[2, 4, 5].index(best)])


def test_scoring_on_the_way_changes_nothing_that_trains() -> None:
    first, second = make_model(), make_model()
    run(first, dataclasses.replace(QUICK, max_steps=4))
    scores = (i + 0 * float(torch.rand(3).sum()) for i in range(9))  # draws on the way
    result = run(second, dataclasses.replace(QUICK, max_steps=4, eval_steps=1), evaluate=scores.__next__)
    assert result.best_step == 4 and same(state(first), state(second))


def test_states_that_nothing_scores_are_refused() -> None:
    with pytest.raises(TrainingError, match="eval_steps=2: there is nothing to score this training by"):
        run(make_model(), dataclasses.replace(QUICK, eval_steps=2))


def test_a_training_that_diverges_says_so() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("classifier.bias")[0] = torch.nan
    with pytest.raises(TrainingError, match="the loss was nan: this training has diverged; a smaller learning rate"):
        run(model)


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train: no parameter requires a gradient"):
        run(model)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eager", "program", "packed"])
def test_in_bfloat16_products_alone_lose_digits(kind: str) -> None:
    def model() -> nn.Module:
        made = make_model()
        if kind == "eager":
            return made
        program = program_of(made, activation_bits=8)
        return program if kind == "program" else lower(program)

    kept, results = [], []
    for precision in ("float32", "bfloat16", "bfloat16"):
        ours = model()
        before = state(ours)
        settings = dataclasses.replace(QUICK, precision=precision, max_steps=6, dropout=False)
        results.append(run(ours, settings))
        kept.append(state(ours))
        assert "forward" not in vars(ours), "the model is as it was, but for its parameters"
        assert all(value.dtype == before[name].dtype for name, value in kept[-1].items())
        assert not same(kept[-1], before)
    exact, first, second = kept
    assert same(first, second) and not same(exact, first)
    assert results[1].loss == pytest.approx(results[0].loss, rel=2e-2) and results[1].loss != results[0].loss


@pytest.mark.parametrize(("precision", "longest", "lengths"), [("bfloat16", 512, {16, 32}), ("float32", 512, set())])
def test_batches_in_bfloat16_have_even_lengths(precision: Precision, longest: int, lengths: set[int]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = longest
    rows = [{"input_ids": list(range(3, 3 + length)), "labels": 0} for length in (5, 9, 16, 17)]
    plain = DataCollatorWithPadding(tokenizer)
    made = [collator_for(precision, plain)([row]) for row in rows]
    found = {batch["input_ids"].shape[1] for batch in made}
    assert found == (lengths or {5, 9, 16, 17})
    for batch, row in zip(made, rows, strict=True):
        assert batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist() == row["input_ids"]
    tokenizer.model_max_length = 20  # 17 tokens still fit, 32 would not
    assert collator_for(precision, plain)(rows[3:])["input_ids"].shape[1] == 17


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0.0),
        ("epochs", math.inf),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("head_learning_rate", -1e-3),
        ("scale_learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("max_grad_norm", 0.0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("seed", -1),
        ("seed", 2**32),
        ("precision", "float16"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float | str) -> None:
    with pytest.raises(TrainingError, match=f"^{name}={value}: expected ") as caught:
        TrainingSettings(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, PrequantError)


def grouped(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    settings = TrainingSettings(learning_rate=0.1, weight_decay=0.5, head_learning_rate=0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, settings, **options)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_a_head_that_is_not_there_is_named() -> None:
    with pytest.raises(TrainingError, match=r"the head's 'score.weight' is no parameter of the model"):
        parameter_groups(make_model(), QUICK, ("classifier.weight", "score.weight"))


def test_decay_acts_on_an_eager_models_matrices_and_the_heads_rate_on_the_head() -> None:
    model = make_model()
    found = grouped(model, head=("classifier.weight", "classifier.bias"))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in found.items():
        assert rate == (0.2 if name.startswith("classifier.") else 0.1), name
        assert decay == (0.0 if "bias" in name or "LayerNorm" in name else 0.5), name
    assert found["bert.embeddings.word_embeddings.weight"] == (0.1, 0.5)


def test_decay_spares_the_parts_of_compressed_weights_and_acts_on_latent_ones() -> None:
    original = make_program()
    coded = Pipeline(
        [
            SplitOutliers(ratio=0.01, exclude=("classifier*",)),
            QuantizeWeights(symmetric=False, exclude=("classifier*", "*pooler*")),
            QuantizeWeights(latent=True, include=("*pooler*",)),
            Train(outliers=True, scales=True, zero_points=True, latents=True, layer_norms=True, head=("classifier.*",)),
        ]
    )(original)
    for program in (coded, lower(coded)):
        found = grouped(program)
        scales = {name for name in found if name.endswith((".scale", ".zero_point"))}
        assert {name for name, (rate, _) in found.items() if rate != 0.1} == scales != set()
        for name in scales:
            assert found[name][0] == pytest.approx(5e-3 * program.tensor(name).abs().mean().item(), rel=1e-6)
        decayed = {name for name, (_, decay) in found.items() if decay}
        assert decayed == {"bert.pooler.dense.weight.latent", "classifier.weight"}
        kinds = {name.rpartition(".")[2] for name in found}
        assert kinds == {"values", "scale", "zero_point", "latent", "weight", "bias"}
