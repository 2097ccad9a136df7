"""Laws of the codecs: unpacking what was packed gives the same bits, and never more than asked."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import FormatError, InputError
from rarefy.grid import Grid
from rarefy.storage import pack as codec
from rarefy.storage.codes import dequantize, quantize
from rarefy.storage.frames import compress
from rarefy.storage.pack import CODECS, DTYPES, Packed


@st.composite
def elements(draw: st.DrawFn) -> np.ndarray:
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    count = draw(st.integers(0, 200))
    seed, present = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    rng = np.random.default_rng(seed)
    values = rng.integers(0, draw(st.sampled_from([2, 16, 256])), (count, itemsize))
    return (values * (rng.random((count, 1)) < present)).astype(np.uint8)


@given(elements())
@settings(max_examples=60, deadline=None)
def test_unpack_is_the_inverse_of_pack(given_elements: np.ndarray) -> None:
    packed = codec.pack(given_elements)
    found = codec.unpack(packed, *given_elements.shape)
    assert found.dtype == np.uint8
    assert np.array_equal(found, given_elements)
    assert packed.size <= given_elements.size


@given(elements())
@settings(max_examples=60, deadline=None)
def test_four_bit_codes_come_back(given_elements: np.ndarray) -> None:
    codes = given_elements[:, :1] & 15
    packed = codec.pack(codes, bits=4)
    assert np.array_equal(codec.unpack(packed, len(codes), 1, bits=4), codes)
    assert packed.size <= (len(codes) + 1) // 2


def test_codes_above_fifteen_do_not_fit_four_bits() -> None:
    with pytest.raises(InputError, match="not below 16"):
        codec.pack(np.full((4, 1), 16, np.uint8), bits=4)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 2)])
def test_every_dtype_and_shape_comes_back(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(10)[: max(1, int(np.prod(shape)))].to(DTYPES[name])
    tensor = (tensor if shape else tensor[0]) if 0 not in shape else torch.zeros(shape).to(tensor)
    tensor = tensor.reshape(shape)
    found = codec.from_bytes(codec.to_bytes(tensor), shape, tensor.dtype)
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert np.array_equal(codec.to_bytes(found), codec.to_bytes(tensor))


def test_sparse_keeps_negative_zero_and_nan_payloads() -> None:
    bits = np.zeros(1000, np.uint32)
    bits[[3, 500, 999]] = [0x80000000, 0x7FC12345, 0xFF800001]
    packed = codec.pack(bits.view(np.uint8).reshape(-1, 4))
    assert packed.codec == "sparse"
    assert np.array_equal(codec.unpack(packed, 1000, 4).reshape(-1).view(np.uint32), bits)


def identical(given_elements: np.ndarray, shape: tuple[int, ...], **options: Any) -> Packed:
    packed = codec.pack(given_elements, None, shape, **options)
    found = codec.unpack(packed, *given_elements.shape, None, shape)
    assert np.array_equal(found, given_elements)
    return packed


@st.composite
def patterned(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor of few values, NaN payloads and -0.0 among them, with zeros in a pattern."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    special = [0x80000000, 0x7FC12345, 0xFF800001, 0x00000001]
    more = rng.integers(0, 2**32, draw(st.integers(0, 12)))
    values = rng.choice(np.array([*special, *more], np.uint32), shape)
    dim = draw(st.integers(0, len(shape) - 1))
    np.moveaxis(values, dim, -1)[..., :: draw(st.integers(2, 4))] = 0
    return values.reshape(-1, 1).view(np.uint8), shape


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("ans", [False, True])
@given(case=patterned())
@settings(max_examples=8, deadline=None)
def test_every_codec_keeps_every_bit(
    name: str, ans: bool, case: tuple[np.ndarray, tuple[int, ...]]
) -> None:
    assert identical(*case, codecs=[name], ans=ans).codec in ("raw", name)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_the_smallest_codec_is_found(mask: bool, palette: bool, itemsize: int) -> None:
    rng = np.random.default_rng(0)
    book = rng.integers(1, 200, (5 if palette else 100_000, itemsize)).astype(np.uint8)
    values = book[rng.integers(0, len(book), 5000)]
    values[(rng.random(5000) < 0.8) & mask] = 0
    found = CODECS[identical(values, (5000,)).codec]
    assert found.mask == (mask and not palette)  # zero is one more entry of the codebook
    assert found.palette == palette


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("dim", [0, 1])
def test_masks_of_n_in_m_take_the_logarithm_of_their_choices(n: int, m: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    kept = rng.permuted(np.arange(64 * 64 * 9).reshape(-1, m) % m < n, axis=1)
    kept = np.moveaxis(kept.reshape(64, 9, 64), 2, dim)
    values = kept[..., None] * rng.integers(1, 256, (*kept.shape, 4))
    packed = identical(values.astype(np.uint8).reshape(-1, 4), kept.shape)
    assert packed.codec == f"sparse{dim}"
    least = kept.size / m * math.log2(math.comb(m, n)) / 8
    assert least <= len(packed.streams[0]) < 1.02 * least + 50


def test_few_values_become_a_codebook_of_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice(rng.standard_normal(13).astype(np.float32), 20_000)
    packed = identical(values.view(np.uint8).reshape(-1, 4), values.shape)
    assert packed.codec == "palette"
    assert len(packed.streams[0]) == 13 * 4
    assert packed.size <= 20_000 * 4 / 8 + 13 * 4
    small = identical(values.view(np.uint8).reshape(-1, 4), values.shape, ans=True)
    assert small.size < 20_000 * math.log2(13) / 8 * 1.02 + 13 * 4
    values[rng.random(20_000) < 0.9] = 0
    assert identical(values.view(np.uint8).reshape(-1, 4), values.shape).codec == "sparse+palette"


def test_ninety_percent_zeros_are_far_smaller_than_dense() -> None:
    weights = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    gone = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) < 0.9
    pruned = weights.masked_fill(gone, 0.0)
    packed = codec.pack(codec.to_bytes(pruned))
    assert packed.codec == "sparse"
    assert packed.size < 0.13 * pruned.numel() * 4


def test_a_tensor_that_does_not_compress_stays_raw() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4096, 4)).astype(np.uint8)
    assert codec.pack(noise).codec == "raw"


@pytest.mark.parametrize(
    "packed",
    [
        Packed("other", (b"",)),
        Packed("raw", (b"123",)),
        Packed("raw", (b"1" * 16, b"")),
        Packed("planes", (b"123",)),
        Packed("planes", (compress(bytes(10_000_000)),)),
        Packed("planes", (compress(bytes(16))[:-2],)),
        Packed("planes", (b"\x01" + bytes(30),)),
        Packed("planes", (b"\x01" + b"\xff" * 60,)),
        Packed("sparse", (b"\xff", b"")),
        Packed("sparse", (b"", b"")),
        Packed("sparse", (b"\x01",)),
        Packed("sparse0", (b"\x0f", bytes(16))),
        Packed("palette", (b"", b"\x00")),
        Packed("palette", (b"123", b"\x00")),
        Packed("palette", (bytes(4 * 257), bytes(4))),
        Packed("palette", (bytes(12), b"\xff")),
        Packed("palette", (bytes(4), bytes(4))),
        Packed("palette", (bytes(4),)),
        Packed("sparse+palette", (b"\x0f", b"", b"")),
    ],
)
def test_wrong_streams_are_refused(packed: Packed) -> None:
    with pytest.raises(FormatError):
        codec.unpack(packed, 4, 4)


def test_booleans_other_than_zero_and_one_are_refused() -> None:
    with pytest.raises(FormatError, match="boolean"):
        codec.from_bytes(np.array([[2]], np.uint8), (1,), torch.bool)


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 255), (-8, 7), (0, 15), (-127, 127)])
@pytest.mark.parametrize("channels", [0, 3])
def test_codes_stand_for_the_values_on_the_grid(low: int, high: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (channels,) if channels else ()
    scale = torch.rand(shape, generator=generator) + 0.01
    zero = torch.randint(low, high + 1, shape, generator=generator)
    grid = Grid(scale, zero, 1, low, high)
    q = torch.randint(low, high + 1, (4, 3, 2), generator=generator)
    values = (q - grid.spread(zero, (4, 3, 2))).float() * grid.spread(scale, (4, 3, 2))
    codes = quantize(values, grid)
    assert grid.bits == (4 if high - low < 16 else None)
    assert torch.equal(dequantize(codes, (4, 3, 2), grid), values)


def test_a_code_out_of_range_is_refused() -> None:
    grid = Grid(torch.tensor(1.0), torch.tensor(0), 0, -127, 127)
    with pytest.raises(FormatError, match="above 127"):
        dequantize(np.array([[128]], np.uint8), (1,), grid)
