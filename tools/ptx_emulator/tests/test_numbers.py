"""The PTX machine's numbers against Python's, torch's and the pages of the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_emulator import numbers
from ptx_emulator import tensor_core as cores


def test_bfloat16_is_torch_s() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, float("inf")])])
    bits = numbers.to_bfloat16(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(numbers.from_bfloat16(bits), x.bfloat16().float().numpy())
    assert np.isnan(numbers.from_bfloat16(numbers.to_bfloat16(np.array([np.nan], np.float32)))).all()


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int64, np.uint64])
def test_integers_are_c_s(kind: type) -> None:
    g = np.random.default_rng(0)
    limits = np.iinfo(kind)
    a, b = (
        g.integers(limits.min, limits.max, 500, kind) >> g.integers(0, 31, 500).astype(kind) for _ in "ab"
    )
    b[b == 0] = 1
    exact: list[tuple[int, int]] = [(int(x), int(y)) for x, y in zip(a, b)]

    def towards_zero(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    assert [int(q) for q in numbers.BINARY["div"](a, b)] == [towards_zero(x, y) for x, y in exact]
    assert [int(r) for r in numbers.BINARY["rem"](a, b)] == [x - towards_zero(x, y) * y for x, y in exact]
    if kind is not np.int64:
        assert [int(h) for h in numbers.product(a, b, "hi")] == [x * y >> a.itemsize * 8 for x, y in exact]
    n = np.uint32(a.itemsize * 8)
    assert (numbers.BINARY["shl"](a, n) == 0).all()
    assert (numbers.BINARY["shr"](a, n) == np.where(a < 0, kind(-1 if limits.min < 0 else 0), kind(0))).all()


@pytest.mark.parametrize(
    "selector,expected",
    [(0x3210, 0x44332281), (0x7654, 0x88776655), (0x0246, 0x81335577), (0x1118, 0x222222FF)],
)
def test_bytes_are_permuted_and_signs_spread(selector: int, expected: int) -> None:
    a, b, how = (np.array([x], np.uint32) for x in (0x44332281, 0x88776655, selector))
    assert numbers.permute_bytes(a, b, how) == [expected]


@pytest.mark.parametrize(
    "word,position,length,expected",
    [
        (np.uint32(0xABCD), 4, 8, 0xBC),
        (np.int32(0xABCD), 12, 4, -6),
        (np.uint32(1 << 31), 31, 9, 1),
        (np.int32(-1), 3, 0, 0),
    ],
)
def test_bit_fields(word: np.generic, position: int, length: int, expected: int) -> None:
    got = numbers.extract_bits(np.array([word]), np.uint32(position), np.uint32(length))
    assert got.tolist() == [expected]


def test_conversions_saturate() -> None:
    x = np.array([1e30, -1e30, np.nan, -2.7, 2.5], np.float32)
    assert numbers.convert(x, "s32", "rzi").tolist() == [2**31 - 1, -(2**31), 0, -2, 2]
    assert numbers.convert(x, "s64", "rni").tolist() == [2**63 - 1, -(2**63), 0, -3, 2]
    assert not numbers.compare("ne", x, x)[2] and numbers.compare("neu", x, x)[2]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_is_a_product(kind: str) -> None:
    g = np.random.default_rng(0)
    a, b, c = g.integers(-4, 5, (2, 16, 16)), g.integers(-4, 5, (2, 16, 8)), g.integers(-4, 5, (2, 16, 8))
    short = numbers.to_bfloat16 if kind == "bf16" else numbers.to_float16
    a16, b16 = (short(m.astype(np.float32)) for m in (a, b))
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4 * 2
    # PTX ISA, "Matrix Fragments for mma.m16n8k16": rows and columns of a lane's elements, written out once more.
    a_words = [
        numbers.pack(a16[:, row + i, pair + j], a16[:, row + i, pair + j + 1]) for j in (0, 8) for i in (0, 8)
    ]
    b_words = [numbers.pack(b16[:, pair + i, row], b16[:, pair + i + 1, row]) for i in (0, 8)]
    c_words = [
        c.astype(np.float32)[:, row + i, pair + j].copy().view(np.uint32) for i in (0, 8) for j in (0, 1)
    ]
    d = cores.accumulator(cores.mma(a_words, b_words, c_words, kind))
    assert np.array_equal(d, a @ b + c)


@pytest.mark.parametrize("swizzle,width", [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors_reach_every_element_once(swizzle: int, width: int, transposed: bool) -> None:
    """64 x 16 elements of two bytes fill 2 KB; a swizzle stays within its 8 rows."""
    leading, stride = (16 * width, 8 * width) if transposed else (0, 8 * width)
    descriptor = swizzle << 62 | (stride >> 4) << 32 | (leading >> 4) << 16 | (4096 >> 4)
    got = cores.descriptor_addresses(descriptor, 64, transposed)
    assert len(np.unique(got)) == 1024 and (got % 2 == 0).all() and got.min() == 4096
    plain = got ^ (got >> 7 & (width // 16 - 1)) << 4
    assert plain[0, 0] == 4096 and (plain[1, 0] - 4096 == (2 if transposed else width))


def test_a_product_is_not_rounded_before_the_sum() -> None:
    a, c = np.float32([1 + 2**-12]), np.float32([-1 - 2**-11])
    assert numbers.multiply_add(a, a, c) == 2.0**-24
