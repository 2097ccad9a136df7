"""Laws of the codecs: unpacking what was packed gives the same bits, and never more than asked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import FormatError, InputError
from rarefy.grid import Grid
from rarefy.storage import pack as codec
from rarefy.storage.codes import dequantize, quantize
from rarefy.storage.pack import DTYPES, Packed


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
        Packed("zstd", (b"123",)),
        Packed("zstd", (codec.compress(bytes(10_000_000)),)),
        Packed("zstd", (codec.compress(bytes(16))[:-2],)),
        Packed("sparse", (b"\xff", b"")),
        Packed("sparse", (b"", b"")),
        Packed("sparse", (b"\x01",)),
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
