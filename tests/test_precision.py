"""Precisions of 16-bit parameters: split, kahan and stochastic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sgdcore.reference import (
    join_kahan,
    join_split,
    part_kahan,
    part_split,
    random_bits,
    round_stochastically,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)


def float32_words() -> np.ndarray:
    """Every upper half of a float32 with lower halves around all boundaries."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.uint32([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper | lower).ravel()


class TestOracles:
    def test_split_masters_come_back(self):
        words = float32_words()
        visible, low = part_split(words.view(np.float32))
        back = join_split(visible, low).view(np.uint32)
        changed = back != words
        np.testing.assert_array_equal(changed, (words & 0x7FFF8000) == 0x7FFF8000)
        np.testing.assert_array_equal(words[changed] ^ back[changed], 0x8000)
        quiet = np.isnan(words.view(np.float32)) & (words & 0x00400000 != 0)
        assert np.isnan(visible[quiet].view(BFLOAT16).astype(np.float32)).all()

    def test_split_shows_the_nearest_bfloat16(self):
        words = float32_words()
        values = words.view(np.float32)
        visible, _ = part_split(values)
        seen = visible.view(BFLOAT16).astype(np.float32)
        with np.errstate(all="ignore"):
            even = values.astype(BFLOAT16).astype(np.float32)
        number, tie = ~np.isnan(values), words & 0xFFFF == 0x8000
        np.testing.assert_array_equal(seen[number & ~tie], even[number & ~tie])
        farther = (words + np.uint32(0x8000)).view(np.float32)
        np.testing.assert_array_equal(seen[number & tie], farther[number & tie])

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_kahan_keeps_about_twice_the_digits(self, dtype):
        values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
        back = join_kahan(*part_kahan(values, dtype))
        digits = 11 if dtype == FLOAT16 else 8
        bound = np.maximum(np.abs(values) * 2.0 ** (-2 * digits), 2.0**-25)
        assert (np.abs(back - values) <= bound).all()

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_stochastic_rounding_takes_a_neighbour(self, dtype):
        words = float32_words()
        largest = 65504 if dtype == FLOAT16 else np.inf
        values = words.view(np.float32)
        values = values[np.isfinite(values) & (np.abs(values) <= largest)]
        with np.errstate(all="ignore"):
            exact = values.astype(dtype).astype(np.float32) == values
        for random in (0, 1, 32768, 65535):
            rounded = round_stochastically(values, dtype, np.full(values.shape, random))
            back = rounded.astype(np.float32)
            np.testing.assert_array_equal(back[exact], values[exact])
            np.testing.assert_array_equal(np.signbit(back), np.signbit(values))
            if random == 0:
                assert (np.abs(back) <= np.abs(values)).all()


class TestRandomBits:
    """Every bound is the statistic's standard deviation times four, over 2**20 draws."""

    N = 1 << 20
    KEYS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 5, 10**6))

    def uniform(self, seed: int, position: int, steps: int) -> np.ndarray:
        return (random_bits(seed, position, steps, np.arange(self.N)) + 0.5) / 65536

    def correlation(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a - 0.5) * (b - 0.5)) * 12 * np.sqrt(a.size))

    @pytest.mark.parametrize("key", KEYS)
    def test_mean_and_variance(self, key):
        u = self.uniform(*key)
        assert abs(u.mean() - 0.5) * np.sqrt(12 * self.N) < 4
        assert abs(np.mean((u - 0.5) ** 2) * 12 - 1) * np.sqrt(self.N / 0.8) < 4

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 1024, 4096, 65536])
    def test_neighbours_are_uncorrelated(self, lag):
        for key in self.KEYS:
            u = self.uniform(*key)
            assert abs(self.correlation(u[:-lag], u[lag:])) < 4

    @pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)])
    def test_seeds_parameters_and_steps_are_uncorrelated(self, other):
        u = self.uniform(0, 0, 0)
        v = self.uniform(*other)
        assert abs(self.correlation(u, v)) < 4
        # Nor is one a shifted copy of the other.
        assert all(abs(self.correlation(u[k:], v[: -k or None])) < 4.5 for k in range(1, 64))

    @pytest.mark.parametrize("key", KEYS)
    def test_values_and_pairs_of_neighbours_are_uniform(self, key):
        bits = random_bits(*key, np.arange(self.N)).astype(np.int64)
        upper, lower = bits >> 8, bits & 255
        tables = {
            "values": bits,
            "neighbours, upper": upper[0::2] * 256 + upper[1::2],
            "neighbours, lower": lower[0::2] * 256 + lower[1::2],
            "across pairs": upper[1:-1:2] * 256 + upper[2::2],
        }
        for name, cells in tables.items():
            expected = cells.size / 65536
            chi = ((np.bincount(cells, minlength=65536) - expected) ** 2).sum() / expected
            assert abs(chi - 65535) / np.sqrt(2 * 65535) < 4, name

    def test_an_element_over_steps(self):
        for element in (0, 1, 1000):
            u = np.array([random_bits(0, 0, step, [element])[0] for step in range(4096)]) / 65536
            assert abs(u.mean() - 0.5) * np.sqrt(12 * u.size) < 4
            assert abs(self.correlation(u[:-1], u[1:])) < 4

    @pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
    def test_rounding_is_unbiased(self, dtype):
        for value in (1.001, -3.14159, 0.1, 6e-8, 1234.5):
            values = np.full(self.N, value, dtype=np.float32)
            rounded = round_stochastically(
                values, dtype, random_bits(1, 2, 3, np.arange(self.N))
            ).astype(np.float64)
            spread = rounded.std()
            assert abs(rounded.mean() - float(values[0])) <= 4 * spread / np.sqrt(self.N) + 2**-41
