"""Number formats: bfloat16 where the device multiplies fast in it."""

import pytest
import torch

from dype.pipelines import devices


@pytest.mark.parametrize(
    ("cost", "expected"), [(0.2, "bfloat16"), (1.5, "bfloat16"), (3, "float32"), (90, "float32")]
)
def test_fast_dtype(cost, expected, monkeypatch):
    """By the time of a product on one thread; cost: bfloat16's, in that of float32."""
    clock, threads, used = [0.0], torch.get_num_threads(), set()

    def multiply(a, b):
        used.add(torch.get_num_threads())
        clock[0] += cost if a.dtype == torch.bfloat16 else 1

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(devices.timeit, "default_timer", lambda: clock[0])
    assert devices.fast_dtype.__wrapped__("cpu") == expected
    assert used == {1}
    assert torch.get_num_threads() == threads
    clock.clear()  # nothing is timed for a GPU
    assert devices.fast_dtype.__wrapped__("cuda") == "bfloat16"
