"""Faults planted in code of one line: the questions that every op is asked notice each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import test_ops
import torch
from op_table import BY_NAME, FP32
from torch import Tensor

from protoclip.ops import checks, dispatch, reference, siglip_loss


def with_arrays_rounded(op: str, x: Any, *rest: Any, **options: Any) -> Tensor:
    return ORIGINAL_SCALE(op, x if isinstance(x, Tensor | int) else float(x) + 1, *rest, **options)


def rows_in_half_precision(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.cdist(x.half().float(), c.half().float()).argmin(dim=1)
    return labels, (x - c[labels]).square().sum(dim=1)


def less_smoothing(*tensors: Tensor, **options: Any) -> Tensor:
    return 0.9 * ORIGINAL_SUMS(*tensors, **options)


def without_weights(losses: Tensor, counted: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return ORIGINAL_REDUCE(losses, counted, None, *rest)


ORIGINAL_SCALE = checks.scale
ORIGINAL_SUMS = siglip_loss.signed_sums
ORIGINAL_REDUCE = siglip_loss.reduce_weighted
of_siglip = partial(
    test_ops.test_values_and_gradients_are_within_budget, BY_NAME["sigmoid_loss"], "reference", FP32
)
# Where the fault is planted, and the question that has to notice it.
FAULTS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "SigLIP smooths by less": (siglip_loss, "signed_sums", less_smoothing, of_siglip),
    "SigLIP forgets weights": (siglip_loss, "reduce_weighted", without_weights, of_siglip),
    "a scale from NumPy is off": (
        checks,
        "scale",
        with_arrays_rounded,
        partial(test_ops.test_a_scale_is_any_number, np.float32(10)),
    ),
    "mixed dtypes take the first": (
        checks,
        "common_dtype",
        lambda tensors: tensors[0].dtype,
        partial(test_ops.test_mixed_dtypes_are_promoted, BY_NAME["info_nce"]),
    ),
    "distances in half precision": (
        reference,
        "_assign_rows",
        rows_in_half_precision,
        partial(
            test_ops.test_values_and_gradients_are_within_budget,
            *(BY_NAME["kmeans_assign"], "reference", FP32),
        ),
    ),
    "a transform is overlooked": (
        dispatch,
        "in_transform",
        lambda: False,
        partial(
            test_ops.test_transforms_take_the_reference_or_are_refused, "grad", BY_NAME["info_nce"]
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_question_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, question = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    # RuntimeError: of torch.
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        question()
