"""The rule that float comparisons obey: what it allows and what it does not."""

from __future__ import annotations

import pytest
import torch
from bounds import FLOOR, SLACK, InFp64, allowed, assert_right, assert_same_in_fp64, error
from family import (
    assert_near_eager,
    exact_logits,
    in_fp64,
    prompt,
    relative_loss,
    transformers_model,
)
from torch import Tensor


def rounded() -> tuple[Tensor, Tensor]:
    """A product in fp32 and in fp64."""
    a, b = torch.randn(2, 50, 50, generator=torch.Generator().manual_seed(0)).unbind()
    return a @ b, a.double() @ b.double()


def test_an_error_up_to_the_bound_is_right_and_a_larger_one_is_not() -> None:
    plain, truth = rounded()
    bound = allowed(plain, truth)
    assert bound == pytest.approx(SLACK * error(plain, truth) + FLOOR * truth.abs().max().item())
    assert_right(plain, plain, truth)
    for size, right in ((0.9, True), (1.1, False)):
        got = truth.clone()
        got[3, 4] += size * bound
        if right:
            assert_right(got, plain, truth)
        else:
            with pytest.raises(AssertionError, match="allowed"):
                assert_right(got, plain, truth)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_right(wrong: float) -> None:
    plain, truth = rounded()
    got = plain.clone()
    got[0, 0] = wrong
    with pytest.raises(AssertionError, match="allowed"):
        assert_right(got, plain, truth)


def test_a_result_that_cancels_has_the_scale_of_its_inputs() -> None:
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="allowed 0"):
        assert_right(zero + 1e-6, zero, zero.double())
    assert_right(zero + 1e-6, zero, zero.double(), scale=1.0)
    with pytest.raises(AssertionError, match="allowed 1e-05"):
        assert_right(zero + 1e-4, zero, zero.double(), scale=1.0)


def test_results_in_fp64_differ_by_less_than_fp32_rounds() -> None:
    _, truth = rounded()
    assert_same_in_fp64(truth * (1 + 1e-13), truth)
    with pytest.raises(AssertionError, match="allowed"):
        assert_same_in_fp64(truth.float().double(), truth)
    with pytest.raises(AssertionError, match="float32"):
        assert_same_in_fp64(truth.float(), truth)


def test_few_values_have_the_loss_of_many() -> None:
    plain, truth = rounded()
    loss = error(plain, truth)
    one = truth[:1, :1]
    got = one + 1.5 * loss + FLOOR * one.abs()
    with pytest.raises(AssertionError, match="allowed"):
        assert_right(got, one, one)
    assert_right(got, one, one, loss=loss)
    with pytest.raises(AssertionError, match="allowed"):
        assert_right(one + 2.5 * loss + FLOOR * one.abs(), one, one, loss=loss)


def test_shapes_and_the_dtype_of_the_truth_count() -> None:
    plain, truth = rounded()
    with pytest.raises(AssertionError):
        assert_right(plain[:1], plain, truth)  # would broadcast
    with pytest.raises(AssertionError, match="float32"):
        assert_right(plain, plain, truth.float())


def test_fp64_stays_fp64_where_code_asks_for_fp32() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with InFp64():
        assert torch.equal(x.float(), x) and torch.equal(x.to(torch.float32), x)
        scores = torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32)
    assert torch.equal(scores, x.softmax(-1))
    assert x.float().dtype == torch.float32


def test_models_are_held_to_what_eager_loses() -> None:
    ids = prompt(1, 20)
    with torch.no_grad():
        eager = transformers_model("e2b")(ids).logits
    truth = exact_logits("e2b", ids)
    assert truth.dtype == torch.float64 and torch.equal(
        in_fp64(transformers_model("e2b"), ids).logits,
        truth,
    )
    floats = {t.dtype for t in [*transformers_model("e2b").parameters(), *transformers_model("e2b").buffers()]}
    assert floats == {torch.float32}  # the truth is computed by copies
    assert 1e-7 < relative_loss("e2b") < 1e-4
    assert_near_eager(eager, eager)
    with pytest.raises(AssertionError, match="allowed"):
        assert_near_eager(eager * 1.001, eager)
    with pytest.raises(AssertionError):
        assert_near_eager(eager.double(), eager)
