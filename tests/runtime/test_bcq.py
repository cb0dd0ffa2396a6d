import itertools

import pytest
import torch

from prequant.runtime import FormatError, QuantizedWeight, Quantizer, WeightFormat, binary_code, ops
from prequant.runtime.bcq import from_affine
from prequant.runtime.packing import unpack
from prequant.runtime.reference import dequantize


def decoded(coded: QuantizedWeight, format: WeightFormat, columns: int) -> torch.Tensor:
    return dequantize(coded.codes, coded.scale, None, format, columns)


def squared_error(weight: torch.Tensor, format: WeightFormat, rounds: int) -> float:
    return float((weight - decoded(binary_code(weight, format, rounds), format, weight.shape[1])).square().sum())


def brute_force(row: torch.Tensor, planes: int) -> float:
    """The least squared error of one row over all binary planes and real alphas, in float64."""
    row, least = row.double(), float("inf")
    vectors = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=len(row))]
    for chosen in itertools.combinations_with_replacement(vectors, planes):
        basis = torch.stack(chosen, 1)
        alphas = torch.linalg.lstsq(basis, row.unsqueeze(1), driver="gelsd").solution
        least = min(least, float((row.unsqueeze(1) - basis @ alphas).square().sum()))
    return least


def written_out_greedy(row: list[float], planes: int) -> tuple[list[list[int]], list[float]]:
    """The algorithm of the paper on plain numbers: b = sign(r), alpha = mean|r|, r = r - alpha b."""
    bits, alphas = [], []
    for _ in range(planes):
        alpha = sum(abs(value) for value in row) / len(row)
        signs = [1 if value >= 0 else -1 for value in row]
        row = [value - alpha * sign for value, sign in zip(row, signs, strict=True)]
        bits.append([int(sign > 0) for sign in signs])
        alphas.append(alpha)
    return bits, alphas


def test_one_plane_is_the_mean_magnitude_times_the_sign() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    format = WeightFormat.bcq(1)
    coded = binary_code(weight, format)
    assert coded.scale.tolist() == [[[1.5], [0.0]]]
    assert unpack(coded.codes, format, 4).tolist() == [[[1, 0, 1, 1], [1, 1, 1, 1]]]  # 0 counts as +1
    assert decoded(coded, format, 4).tolist() == [[1.5, -1.5, 1.5, 1.5], [0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_one_plane_is_optimal(seed: int) -> None:
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    assert squared_error(row, WeightFormat.bcq(1), 0) == pytest.approx(brute_force(row[0], 1), rel=1e-5)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_greedy_is_the_algorithm_of_the_paper(planes: int) -> None:
    weight = torch.randn(3, 20)
    format = WeightFormat.bcq(planes)
    coded = binary_code(weight, format)
    bits = unpack(coded.codes, format, 20)
    for index, row in enumerate(weight.double().tolist()):
        expected_bits, expected_alphas = written_out_greedy(row, planes)
        assert bits[:, index].tolist() == expected_bits
        assert coded.scale[:, index, 0].tolist() == pytest.approx(expected_alphas, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_refinement_lies_between_the_optimum_and_greedy(seed: int) -> None:
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    optimum, format = brute_force(row[0], 2), WeightFormat.bcq(2)
    greedy, refined = squared_error(row, format, 0), squared_error(row, format, 15)
    assert optimum - 1e-5 <= refined <= greedy + 1e-5


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("planes", [2, 3, 4])
def test_every_round_of_refinement_lowers_the_error(planes: int, group_size: int) -> None:
    weight, format = torch.randn(8, 70), WeightFormat.bcq(planes, group_size)
    errors = [squared_error(weight, format, rounds) for rounds in range(8)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_refinement_finds_a_weight_that_is_a_sum_of_two_planes() -> None:
    signs = torch.randint(0, 2, (2, 4, 32)) * 2 - 1
    weight = 2.0 * signs[0] + 0.5 * signs[1]
    format = WeightFormat.bcq(2)
    coded = binary_code(weight, format, 5)
    assert torch.allclose(decoded(coded, format, 32), weight, atol=1e-4)
    assert torch.allclose(coded.scale[:, :, 0], torch.tensor([[2.0], [0.5]]).expand(2, 4), atol=1e-4)


def test_refined_alphas_are_positive_and_descend() -> None:
    alphas = binary_code(torch.randn(64, 5) ** 3, WeightFormat.bcq(4), 10).scale
    assert bool((alphas >= 0).all())
    assert bool((alphas[1:] <= alphas[:-1]).all())


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("weight", [torch.zeros(2, 9), torch.full((2, 9), 0.25), torch.ones(1, 1)])
def test_constant_weights_are_exact(weight: torch.Tensor, rounds: int) -> None:
    format = WeightFormat.bcq(3)
    assert torch.allclose(decoded(binary_code(weight, format, rounds), format, weight.shape[1]), weight, atol=1e-6)


def test_large_weights_are_solved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = torch.randn(40, 50), WeightFormat.bcq(2, 16)
    whole = binary_code(weight, format, 2)
    monkeypatch.setattr("prequant.runtime.bcq.CHUNK", 64)
    chunked = binary_code(weight, format, 2)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.allclose(whole.scale, chunked.scale)


@pytest.mark.parametrize("text", ["affine2:row", "affine4:tensor", "affine3:group8", "affine7:row", "affine4:row:asym"])
def test_affine_codes_as_planes_have_the_same_values(text: str) -> None:
    weight, format = torch.randn(6, 20), WeightFormat.parse(text)
    quantized = Quantizer(format)(weight)
    coded, target = from_affine(quantized, format, 20)
    assert (target.bits, target.group_size) == (format.bits + 1, format.group_size)
    assert tuple(coded.codes.shape) == target.codes_shape(6, 20)
    assert tuple(coded.scale.shape) == target.scale_shape(6, 20)
    expected = dequantize(quantized.codes, quantized.scale, quantized.zero_point, format, 20)
    # A few roundings of the largest partial sum, s 2^(bits - 1).
    tolerance = 4 * torch.finfo(torch.float32).eps * float(quantized.scale.max()) * 2**format.bits
    assert float((decoded(coded, target, 20) - expected).abs().max()) <= tolerance
    values = ops.dequantize_bcq(coded.codes, coded.scale, format=str(target), columns=20)
    assert torch.equal(values, decoded(coded, target, 20))


def test_affine_codes_as_planes_are_exact_in_float64() -> None:
    weight, format = torch.randn(6, 20), WeightFormat.affine(4)
    quantized = Quantizer(format)(weight)
    wide = quantized._replace(scale=quantized.scale.double())
    coded, target = from_affine(wide, format, 20)
    assert torch.equal(decoded(coded, target, 20), dequantize(wide.codes, wide.scale, None, format, 20))


def test_what_can_not_be_coded_says_why() -> None:
    format = WeightFormat.bcq(2)
    with pytest.raises(FormatError, match="makes bcq weights, not affine4:row"):
        binary_code(torch.ones(2, 2), WeightFormat.affine(4))
    with pytest.raises(FormatError, match="rounds=-1 must not be negative"):
        binary_code(torch.ones(2, 2), format, -1)
    with pytest.raises(FormatError, match="NaN or infinity"):
        binary_code(torch.tensor([[float("nan")]]), format)
    with pytest.raises(FormatError, match=r"of type torch\.int64, not a float"):
        binary_code(torch.ones(2, 2, dtype=torch.int64), format)
    with pytest.raises(FormatError, match="3 dimensions"):
        binary_code(torch.ones(2, 2, 2), format)
    quantized = Quantizer(WeightFormat.affine(8))(torch.randn(2, 8))
    with pytest.raises(FormatError, match="bits=9"):
        from_affine(quantized, WeightFormat.affine(8), 8)
    with pytest.raises(FormatError, match="not ternary:row"):
        from_affine(quantized, WeightFormat.ternary(), 8)
