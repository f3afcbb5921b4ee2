"""Arrays of a step in one buffer."""

import numpy as np
import torch

from patchclamp_server.engine.executors.packed import Packed, packed

CPU = torch.device("cpu")


def test_arrays_of_any_shape_keep_their_values_and_begin_at_16_bytes() -> None:
    arrays = {
        "three": np.array([1, 2, 3], dtype=np.int64),
        "odd": np.arange(15, dtype=np.int32).reshape(3, 5),
        "empty": np.zeros((0, 2), dtype=np.int32),
        "last": np.array([7], dtype=np.int32),
    }
    on_device = packed(arrays, CPU)
    for name, values in arrays.items():
        assert np.array_equal(on_device[name].numpy(), values), name
        assert on_device[name].data_ptr() % 16 == 0, name


def test_a_buffer_of_nothing_but_empty_arrays_can_be_made() -> None:
    assert packed({"empty": np.zeros((0, 2), dtype=np.int32)}, CPU)["empty"].shape == (0, 2)


def test_what_is_written_on_the_host_reaches_the_views_of_the_device() -> None:
    buffer = Packed({"a": ((4,), np.dtype(np.int32)), "b": ((2,), np.dtype(np.int64))}, CPU)
    before = buffer.device["a"].data_ptr()
    buffer.host["a"][:] = 5
    buffer.host["b"][:] = 9
    buffer.upload()
    assert buffer.device["a"].tolist() == [5] * 4
    assert buffer.device["b"].tolist() == [9] * 2
    assert buffer.device["a"].data_ptr() == before
