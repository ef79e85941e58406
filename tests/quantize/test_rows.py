"""Work by parts: every row once, the caller's modes, threads as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penguin_edge.quantize.linear import QuantizedLinear, Scheme, quantize_weight
from penguin_edge.quantize.rows import by_parts, one_thread


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@given(st.integers(1, 9))
def test_every_row_is_in_one_part_in_order(rows: int) -> None:
    parts = by_parts(rows, lambda begin, end: list(range(begin, end)))
    assert [row for part in parts for row in part] == list(range(rows))
    assert len(parts) == min(2, rows)


def test_parts_compute_alone_and_in_the_mode_of_the_caller() -> None:
    def look(begin: int, end: int) -> tuple[int, bool, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert by_parts(2, look) == [(1, True, False)] * 2
    with torch.no_grad():
        assert by_parts(2, look) == [(1, False, False)] * 2
    with torch.inference_mode():
        out = torch.zeros(2)
        by_parts(2, lambda begin, end: out[begin:end].fill_(1))  # refused outside of the mode
        assert out.tolist() == [1, 1]


def test_an_error_of_a_part_is_the_callers() -> None:
    def fail(begin: int, end: int) -> None:
        if begin:
            raise ValueError("the second part")

    with pytest.raises(ValueError, match="the second part"):
        by_parts(2, fail)


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(8), Scheme(4, 32, symmetric=False)])
def test_integers_and_products_do_not_depend_on_threads(scheme: Scheme) -> None:
    weight = torch.randn(3001, 256, generator=torch.Generator().manual_seed(0))  # parts end inside of slabs
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    found = quantize_weight(weight, scheme)
    product = QuantizedLinear(found, None, "block")(x)
    with one_thread():
        alone = quantize_weight(weight, scheme)
        assert torch.equal(product, QuantizedLinear(alone, None, "block")(x))
    for name in ("levels", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
