"""What is kept of an answer, against float64 arithmetic written another way."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.distillation.losses import KD
from rarefy.distillation.soft_labels.records import (
    FORMS,
    Dense,
    Form,
    Layout,
    Outputs,
    Sampled,
    TopK,
    checksums,
    form_for,
    smallest_k,
)
from rarefy.distillation.soft_labels.seeds import seeds, uniforms
from rarefy.errors import DataError, InputError

SHAPES = [((7,), -1), ((7,), 1), ((3, 7), -1), ((7, 2, 3), 1), ((7, 2, 3), -3), ((), -1)]


def stored(outputs: Tensor, form: Form, dim: int = -1, seed: int = 0) -> Tensor:
    """Outputs after a way through bytes."""
    layout = Layout(form, tuple(outputs.shape[1:]), dim)
    count = len(outputs)
    records = layout.pack(outputs, np.arange(count), np.zeros(count, np.uint32), seed, salt=5)
    return layout.unpack(np.frombuffer(records.tobytes(), layout.dtype))


def reference(logits: Tensor, temperature: float = 1.0, dim: int = -1) -> np.ndarray:
    """Softmax in float64 by NumPy."""
    scaled = logits.double().numpy() / temperature
    powers = np.exp(scaled - scaled.max(axis=dim, keepdims=True))
    return powers / powers.sum(axis=dim, keepdims=True)


@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(0.1, 30), st.floats(0.5, 20))
@settings(max_examples=40, deadline=None)
def test_dense_is_the_teacher_within_half_precision(seed, shape_dim, scale, temperature) -> None:
    shape, dim = shape_dim
    logits = torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed)) * scale
    if not shape:
        logits = logits * 0  # the only distribution over one class
    found = stored(logits, Dense(), dim)
    assert found.dtype == torch.float32
    assert found.shape == logits.shape
    exact = np.log(reference(logits, dim=dim)) if shape else np.zeros(5)
    assert np.allclose(found.numpy(), exact, rtol=2**-11, atol=1e-6)
    if shape:  # log p of size a is off by a * 2^-11 at most, and at T by that over T
        worst = np.abs(exact).max() * 2**-11 / temperature
        softened = reference(found, temperature, dim)
        assert np.abs(softened - reference(logits, temperature, dim)).max() <= worst + 1e-6


@given(st.integers(0, 999), st.integers(1, 40), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_top_k_is_wrong_by_the_mass_left_out_at_most(seed, k, scale) -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) * scale
    found, exact = stored(logits, TopK(k)), reference(logits)
    ranked = np.sort(exact)[:, ::-1]
    left_out = ranked[:, k:].sum(axis=1)
    kept = np.argsort(-exact)[:, :k]
    read = np.exp(found.double().numpy())
    assert np.allclose(read.sum(axis=1), 1, atol=5e-3)
    assert np.allclose(
        np.take_along_axis(read, kept, 1), np.take_along_axis(exact, kept, 1), rtol=0.01
    )
    assert (np.abs(read - exact).sum(axis=1) <= 2 * left_out + 5e-3).all()


@given(st.integers(0, 99), st.integers(1, 40), st.floats(1, 8))
@settings(max_examples=30, deadline=None)
def test_at_any_temperature_top_k_is_the_best_guess_from_its_tail(seed, k, temperature) -> None:
    """The tail, spread evenly, has the largest softened mass that its mass can have."""
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) * 3
    exact = reference(logits)
    order = np.argsort(-exact)
    flat = np.take_along_axis(exact, order, 1)
    flat[:, k:] = flat[:, k:].mean(axis=1, keepdims=True) if k < 40 else flat[:, k:]
    softened = flat ** (1 / temperature)
    softened /= softened.sum(axis=1, keepdims=True)
    read = reference(stored(logits, TopK(k)), temperature)
    assert np.abs(np.take_along_axis(read, order, 1) - softened).max() < 5e-3


def test_nothing_is_lost_beyond_the_range_of_half_precision() -> None:
    logits = torch.tensor([[0.0, -1e5, -math.inf]])
    found = stored(logits, Dense())
    assert found[0, 1] == -65504
    assert found[0, 2] == -math.inf
    assert stored(logits, TopK(1)).isfinite()[0, 0]
    certain = stored(torch.tensor([[0.0, -math.inf, -math.inf]]), TopK(1))
    assert certain.tolist() == [[0.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("classes", [2, 256, 257, 32769, 65536, 65537])
@pytest.mark.parametrize("form", [TopK(2), Sampled(2)])
def test_indices_do_not_wrap(classes: int, form: Form) -> None:
    logits = torch.full((1, classes), -20.0)
    logits[0, -1] = 20.0
    assert stored(logits, form).argmax() == classes - 1


def test_draws_are_unbiased_and_as_even_as_can_be() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]])
    exact, draws, temperature = reference(logits, 2.0)[0], 8, 2.0
    shares = [
        reference(stored(logits, Sampled(draws, temperature), seed=s), temperature)[0]
        for s in range(600)
    ]
    counts = np.array(shares) * draws
    assert np.allclose(counts, counts.round(), atol=1e-4)
    assert (np.abs(counts - draws * exact) < 1 + 1e-4).all()
    assert np.allclose(counts.mean(axis=0), draws * exact, atol=2.5 / math.sqrt(600))


def test_the_gradient_of_draws_is_that_of_the_teacher_on_average() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def gradient(answers: Tensor) -> Tensor:
        student = torch.zeros(1, 4, requires_grad=True)
        KD(temperature=2.0)(student, answers).backward()
        assert student.grad is not None
        return student.grad

    found = [gradient(stored(logits, Sampled(4, 2.0), seed=s)) for s in range(400)]
    assert torch.allclose(torch.stack(found).mean(dim=0), gradient(logits), atol=0.05)


def test_classes_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(50, 5)
    assert (stored(logits, Sampled(3))[:, [0, 2, 4]] == -math.inf).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 0.0)])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_outputs_are_kept_as_they_are(dtype, tolerance, shape, dim) -> None:
    values = torch.randn(4, *shape)
    found = stored(values, Outputs(dtype), dim)
    assert found.shape == values.shape
    assert torch.allclose(found, values, rtol=tolerance, atol=tolerance)


def test_outputs_beyond_half_precision_are_refused() -> None:
    with pytest.raises(DataError, match="float32"):
        stored(torch.tensor([[1e6]]), Outputs())


@given(st.integers(0, 99), st.floats(0.05, 1.0), st.floats(0.3, 6), st.floats(0.5, 9))
@settings(max_examples=40, deadline=None)
def test_k_is_the_fewest_that_keep_the_mass(seed, mass, scale, temperature) -> None:
    logits = torch.randn(6, 3, 30, generator=torch.Generator().manual_seed(seed)) * scale
    k, kept = smallest_k(logits, mass, temperature)
    ranked = np.sort(reference(logits / temperature).reshape(-1, 30))[:, ::-1]
    of = [ranked[:, :n].sum(axis=1).mean() for n in range(31)]
    assert kept == pytest.approx(of[k], abs=1e-5)
    assert k == 30 or of[k] >= mass - 1e-5
    assert of[k - 1] < mass + 1e-5


def test_few_classes_are_dense_and_many_are_not() -> None:
    torch.manual_seed(0)
    assert form_for(torch.randn(8, 1, 10), 0.99, 1.0) == (Dense(), 1.0)
    form, kept = form_for(torch.randn(8, 1, 1000) * 8, 0.99, 1.0)
    assert isinstance(form, TopK)
    assert kept >= 0.99
    assert form_for(torch.zeros(8, 1, 1000), 0.99, 1.0)[0] == Dense()


def test_a_high_temperature_needs_the_classes_that_a_low_one_does_not() -> None:
    sure = torch.tensor([[[9.0, 2.0, 1.0, *[0.0] * 7]]])
    assert form_for(sure, 0.99, 1.0)[0] == TopK(1)
    assert form_for(sure, 0.99, 4.0)[0] == Dense()


@pytest.mark.parametrize("form", [Dense(), TopK(3), Sampled(6), Outputs()])
def test_a_checksum_covers_every_bit_the_place_and_the_store(form: Form) -> None:
    layout = Layout(form, (7,))
    rows = np.arange(3, 5)
    records = layout.pack(torch.randn(2, 7), rows, np.array([1, 2], np.uint32), 0, salt=9)
    content = records.tobytes()
    size = layout.dtype.itemsize
    begin = (4 * 2654435761 + 9) % 2**32  # as the format says
    assert zlib.crc32(content[size : 2 * size - 4], begin) == records["checksum"][1]
    for bit in range(8 * (2 * size)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        again = np.frombuffer(bytes(damaged), layout.dtype)
        assert (checksums(again, rows, 9) != again["checksum"]).sum() == 1
    assert (checksums(records, rows + 1, 9) != records["checksum"]).all()
    assert (checksums(records, rows, 10) != records["checksum"]).all()
    blank = np.zeros(1000, layout.dtype)
    assert (checksums(blank, np.arange(1000), 9) != 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0),
        lambda: TopK(True),
        lambda: Sampled(0),
        lambda: Sampled(2, temperature=0.0),
        lambda: Outputs("bfloat16"),
        lambda: Layout(TopK(8), (7,)).dtype,
    ],
)
def test_forms_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_forms_are_made_again_from_what_the_manifest_says() -> None:
    for form in (Dense(), TopK(3), Sampled(6, 2.0), Outputs("float32")):
        assert FORMS[form.kind](**form.options) == form


def test_seeds_depend_on_every_coordinate_and_on_nothing_else() -> None:
    found = seeds(np.arange(4)[:, None, None], np.arange(5)[:, None], np.arange(50))
    assert len(np.unique(found)) == 4 * 5 * 50
    assert found[2, 3, 7] == seeds(2, 3, 7)
    assert seeds(-1, 2**40) != seeds(2**40, -1)


def test_uniforms_are_uniform() -> None:
    found = np.sort(uniforms(3, np.arange(4000)))
    assert found[0] >= 0
    assert found[-1] < 1
    assert np.abs(found - np.linspace(0, 1, 4000)).max() < 1.95 / math.sqrt(4000)  # K-S, 0.1 %
