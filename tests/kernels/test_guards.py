"""Guarded buffers catch a write of one element beyond either end."""

import pytest
import torch
from guards import MARGIN, Guarded, guard

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64]


def write_beyond(guarded: Guarded, offset: int) -> None:
    """What a kernel does that was given the pointer: nothing between it and its neighbours' memory."""
    flat = guarded.tensor.view(-1)
    flat.as_strided((1,), (1,), flat.storage_offset() + offset).zero_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_before_the_buffer_is_caught(dtype: torch.dtype) -> None:
    guarded = Guarded((3, 5), dtype)
    write_beyond(guarded, -1)
    with pytest.raises(AssertionError, match="outside"):
        guarded.assert_margins_intact()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_after_the_buffer_is_caught(dtype: torch.dtype) -> None:
    guarded = Guarded((3, 5), dtype)
    write_beyond(guarded, 15)
    with pytest.raises(AssertionError, match="outside"):
        guarded.assert_margins_intact()


@pytest.mark.parametrize("offset", [0, 14])
def test_the_first_and_last_element_belong_to_the_buffer(offset: int) -> None:
    guarded = Guarded((3, 5), torch.float32)
    write_beyond(guarded, offset)
    guarded.assert_margins_intact()


def test_the_far_ends_of_the_margins_are_watched() -> None:
    for offset in (-MARGIN // 4, 15 + MARGIN // 4 - 1):
        guarded = Guarded((3, 5), torch.float32)
        write_beyond(guarded, offset)
        with pytest.raises(AssertionError, match="outside"):
            guarded.assert_margins_intact()


def test_an_empty_buffer_has_margins() -> None:
    guarded = Guarded((0, 5), torch.float32)
    guarded.assert_margins_intact()
    guarded._bytes[MARGIN] = 0
    with pytest.raises(AssertionError, match="outside"):
        guarded.assert_margins_intact()


def test_outputs_start_as_what_no_kernel_computes() -> None:
    assert Guarded((4,), torch.bfloat16).tensor.isnan().all()
    assert (Guarded((4,), torch.int32).tensor == 113).all()


def test_a_guarded_input_is_an_equal_contiguous_copy() -> None:
    x = torch.arange(12.0).view(3, 4).t()
    guarded = guard(x)
    assert torch.equal(guarded.tensor, x)
    assert guarded.tensor.is_contiguous()
    assert guarded.tensor.data_ptr() != x.data_ptr()
