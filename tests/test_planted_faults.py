"""Faults planted in code whose tests have few cases: at least one of the cases notices each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import test_autograd
import test_backends
import test_kmeans_assign
import test_loss_options
import torch
from torch import Tensor

from protoclip.ops import checks, dispatch, reference, siglip_loss


def less_smoothing(*tensors: Tensor, **options: Any) -> Tensor:
    return 0.9 * ORIGINAL_SUMS(*tensors, **options)


def without_weights(losses: Tensor, counted: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return ORIGINAL_REDUCE(losses, counted, None, *rest)


def with_arrays_rounded(op: str, x: Any, *rest: Any, **options: Any) -> Tensor:
    return ORIGINAL_SCALE(op, x if isinstance(x, Tensor | int) else float(x) + 1, *rest, **options)


def rows_in_half_precision(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.cdist(x.half().float(), c.half().float()).argmin(dim=1)
    return labels, (x - c[labels]).square().sum(dim=1)


ORIGINAL_SCALE = checks.scale
ORIGINAL_SUMS = siglip_loss.signed_sums
ORIGINAL_REDUCE = siglip_loss.reduce_weighted
# Where the fault is planted, and the cases of the test that has to notice it.
FAULTS: dict[str, tuple[Any, str, Any, Callable[..., None], Iterable[tuple[Any, ...]]]] = {
    "SigLIP smooths by less": (
        siglip_loss,
        "signed_sums",
        less_smoothing,
        test_loss_options.test_the_sigmoid_loss_with_options_is_its_formula,
        test_loss_options.SIGMOID_OPTIONS,
    ),
    "SigLIP forgets weights": (
        siglip_loss,
        "reduce_weighted",
        without_weights,
        test_loss_options.test_the_sigmoid_loss_with_options_is_its_formula,
        test_loss_options.SIGMOID_OPTIONS,
    ),
    "a scale from NumPy is off": (
        checks,
        "scale",
        with_arrays_rounded,
        test_backends.test_a_scale_is_any_number,
        test_backends.ANY_SCALE,
    ),
    "mixed dtypes take the first": (
        checks,
        "common_dtype",
        lambda tensors: tensors[0].dtype,
        test_backends.test_mixed_dtypes_are_promoted,
        test_backends.MIXED,
    ),
    "distances in half precision": (
        reference,
        "_assign_rows",
        rows_in_half_precision,
        test_kmeans_assign.test_points_go_to_the_nearest_centroid,
        [case for case in test_kmeans_assign.CASES if case[0] == "reference"],
    ),
    "a transform is overlooked": (
        dispatch,
        "in_transform",
        lambda: False,
        test_autograd.test_a_named_fused_backend_refuses_transforms,
        test_autograd.REFUSED_BY,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_case_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, test, cases = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    options = {"monkeypatch": monkeypatch} if test.__name__.startswith("test_the_sigmoid") else {}
    for case in cases:
        arguments = (*case, "reference") if options else case
        try:
            test(*arguments, **options)
        except (AssertionError, pytest.fail.Exception, RuntimeError):  # the last one: of torch
            return
    pytest.fail(f"no case noticed: {fault}")
