"""Ids as small numbers where a backend has a kernel for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from protoclip.kernels.results import IdCodes
from protoclip.ops.dispatch import TABLE, function
from protoclip.ops.operators import operator
from protoclip.ops.pairs import CodeIds, sorted_ids

MOST_COMPARED = 8192  # keys; so many take a sort as long as comparing all pairs, by estimate


def coder_of(backend: str) -> CodeIds:
    """The function that codes ids for a backend of the contrastive op."""
    if TABLE["contrastive"][backend].codes_ids:
        return partial(compared_ids, backend=backend)
    return sorted_ids


def _compared_ids_shapes(arguments: Any) -> IdCodes:
    key_ids = arguments.key_ids
    columns = 1 if key_ids.ndim == 1 else key_ids.shape[1]
    n = 0 if arguments.query_ids is None else arguments.query_ids.shape[0]
    return IdCodes(
        query=key_ids.new_empty((columns, n), dtype=torch.int32),
        key=key_ids.new_empty((columns, key_ids.shape[0]), dtype=torch.int32),
    )


@operator("id_codes", _compared_ids_shapes, IdCodes)
def compared_ids(query_ids: Tensor | None, key_ids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``sorted_ids`` by one kernel that compares each id with all keys': of few keys that is
    faster."""
    if key_ids.shape[0] > MOST_COMPARED:
        query, key = sorted_ids(query_ids, key_ids)
        return query.clone(), key
    return function("contrastive", backend, "id_codes")(query_ids=query_ids, key_ids=key_ids)
