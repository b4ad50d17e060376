import numpy as np
import torch

from modelopt_tdq.compare.metrics import codes_difference, interior, output_difference


def test_an_output_may_differ_by_less_than_the_quantization_noise() -> None:
    rng = np.random.default_rng(0)
    exact, noise, flips = rng.normal(size=(3, 1000))
    reference = exact + 0.01 * noise
    assert output_difference(reference, reference + 0.005 * flips, exact)
    assert not output_difference(reference, reference + 0.02 * flips, exact)
    one_wrong = reference.copy()
    one_wrong[3] += 0.1  # invisible in the mean
    difference = output_difference(reference, one_wrong, exact)
    assert difference.sqnr_db > difference.noise_db
    assert not difference
    spiky = exact.copy()
    spiky[5] += 1.0
    difference = output_difference(spiky, spiky + 0.5, exact)  # no value is far off, but all are
    assert difference.largest < difference.largest_allowed
    assert not difference
    for bad in (np.nan, np.inf):
        one_wrong[3] = bad
        assert not output_difference(reference, one_wrong, exact)


def test_without_quantization_noise_float32_rounding_passes() -> None:
    exact = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert output_difference(exact, exact, exact)
    assert output_difference(exact, np.nextafter(exact, np.float32(9)), exact)
    assert not output_difference(exact, exact * 1.0001, exact)


def test_behind_given_codes_only_rounding_passes() -> None:
    exact = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert output_difference(exact, exact * np.float32(1 + 2e-7), None)
    assert not output_difference(exact, exact * np.float32(1.0001), None)
    assert "rounding" in str(output_difference(exact, exact, None))
    half = exact.astype(np.float16)
    assert output_difference(half, np.nextafter(half, np.float16(9)), None)
    assert not output_difference(half, half * np.float16(1.01), None)


def test_rounding_moves_few_codes_by_one_step() -> None:
    codes = np.random.default_rng(0).integers(-127, 127, 10_000)
    few, many, far = codes.copy(), codes.copy(), codes.copy()
    few[:12] += 1
    many[:13] += 1
    far[0] += 2
    assert codes_difference("q", codes, codes).differing == 0
    assert codes_difference("q", codes, few)
    assert not codes_difference("q", codes, many)
    assert not codes_difference("q", codes, far)
    assert codes_difference("q", codes, far).largest == 2
    assert codes_difference("q", codes[:4], codes[:4] + np.array([1, 1, 0, 0]))  # a layer with few values
    assert not codes_difference("q", codes, codes[1:])


def test_steps_of_fp8_are_its_neighbours() -> None:
    values = torch.arange(-126, 127, dtype=torch.int8)
    bits = torch.where(values < 0, (-values).to(torch.int16) + 128, values.to(torch.int16)).to(torch.uint8)
    ladder = bits.view(torch.float8_e4m3fn).float().numpy()
    assert (np.diff(ladder) > 0).all()  # all finite values, ascending
    assert ladder[-1] == 448
    up = codes_difference("q", ladder[:-1], ladder[1:], fp8=True)
    assert (up.differing, up.count, up.largest) == (252, 252, 1)
    assert codes_difference("q", np.float32([-0.0]), np.float32([0.0]), fp8=True).differing == 0
    assert codes_difference("q", np.float32([1.0]), np.float32([2.0]), fp8=True).largest == 8
    assert codes_difference("q", np.float32([-1.0]), np.float32([1.0]), fp8=True).largest == 2 * 0x38


def test_padding_around_the_codes() -> None:
    codes = np.arange(16).reshape(1, 1, 4, 4)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (2, 2)), constant_values=9)
    assert interior(codes.shape, padded.shape) == (slice(0, 1), slice(0, 1), slice(1, 5), slice(2, 6))
    assert codes_difference("q", codes, padded).differing == 0
    assert interior((4, 4), (5, 4)) is None
    assert interior((4, 4), (2, 4)) is None
    assert interior((4, 4), (1, 4, 4)) is None
