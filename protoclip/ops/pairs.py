"""Which keys a query is compared with: positives, ids, exclusions and biases.

N queries q_i and M keys k_j have the logits l_ij = s q_i.k_j + b_j. Own_i is the query's own key
(or keys), Same_i are the keys with its id, and E_i is the key that it never sees:

    ids          positives P_i              seen S_i
    none         Own - E                    all - E
    "exclude"    Own - E                    ((all - Same) + Own) - E
    "positive"   (Own + Same) - E           all - E

A key whose bias is -inf is in neither set. A query's loss is the LSE over S_i minus the mean over
P_i; a query without positives has no loss. This file turns a user's arguments into the form that
every backend takes (``Pairs``); ``reference.relations`` computes the sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.kernels.results import IdCodes
from protoclip.ops import checks
from protoclip.ops.checks import LEFT_OUT
from protoclip.ops.columns import LOCAL, Local

SAME_ID = ("exclude", "positive")
LEAST_BIAS = -5e29  # that is added to a key; only one of -inf removes it
SameId = Literal["exclude", "positive"]
CodeIds = Callable[[Tensor | None, Tensor], IdCodes]


@dataclass(frozen=True)
class Ids:
    """What SigLIP's op takes about N queries and M keys; None: not used."""

    offset: int = 0  # without ``own_key``, query i's own key is key i + offset
    query_ids: Tensor | None = None  # int32 [R, N]; equal and >= 0 in any row: the same thing
    key_ids: Tensor | None = None  # int32 [R, M]
    same_positive: bool = False  # whether keys of the same id are positives; else they are not seen


@dataclass(frozen=True)
class Compared(Ids):
    """What the softmax op takes."""

    own_key: Tensor | None = None  # int32 [N], position of each query's own key; negative: none
    exclude: Tensor | None = None  # int32 [N], the key that a query never sees; -1: none
    key_bias: Tensor | None = None  # [M]

    @property
    def plain(self) -> bool:
        """Each query has its own key at the offset and sees all keys."""
        compared = (self.own_key, self.exclude, self.key_ids, self.key_bias)
        return all(each is None for each in compared)


@dataclass(frozen=True)
class Pairs(Compared):
    """All that is said of queries and keys: what no kernel takes, too."""

    others: Tensor | None = None  # int64 [N, P], further own keys, for plain torch; -1: none
    left_out: Tensor | None = None  # bool [N], queries that have no loss
    out_of_range: Tensor | None = None  # bool [N], queries with a position out of range

    def own_positions(self, queries: Tensor) -> Tensor:
        """``own_key`` of the queries [N, D], whether it was given or not."""
        if self.own_key is not None:
            return self.own_key
        end = self.offset + queries.shape[0]
        return torch.arange(self.offset, end, dtype=torch.int32, device=queries.device)


class QueryParts(NamedTuple):
    """The loss of each query and what it is made of, in nats, [N] each."""

    loss_per_query: Tensor  # LSE over the keys seen - mean positive
    positive_mean: Tensor  # mean logit of the positives, 0 without any
    num_positives: Tensor


def pairs_of(
    op: str,
    queries: Tensor,
    m: int,
    *,
    positives: Tensor | None = None,
    ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "exclude",
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    columns: Local = LOCAL,
    offset: int = 0,
    code_ids: CodeIds | None = None,
) -> Pairs:
    """Check the arguments of ``contrastive`` about queries [N, D] and M keys, gather those about
    keys from the ranks of ``columns``, and convert all for the backends.

    ``ids`` are those of query i and key i. Without positives query i's own key is key i +
    ``offset`` of this rank. ``code_ids`` takes the place of ``sorted_ids``."""
    n = queries.shape[0]
    device = queries.device
    checks.one_of(op, "same_id", same_id, SAME_ID)
    if key_bias is not None:
        dtypes = [torch.float32, torch.promote_types(queries.dtype, torch.float32)]
        checks.tensor(op, "key_bias", key_bias, dtypes=dtypes, shapes=[(m,)], device=device)
        # Kernels have a number of their own for what is not seen.
        key_bias = key_bias.clamp_min(LEAST_BIAS).where(key_bias != -torch.inf, -torch.inf)
        # Kernels take no strides of it, nor of ids and positions.
        key_bias = columns.gather(key_bias.contiguous())
    if exclude is not None:
        exclude = _integers(op, "exclude", exclude, [(n,)], device)
    if ids is not None:
        query_ids = key_ids = check_ids(op, "ids", ids, m, device)
    elif key_ids is not None:
        key_ids = check_ids(op, "key_ids", key_ids, m, device)
    if key_ids is not None:
        key_ids = columns.gather(key_ids)
    offset = offset + columns.first(m)
    m = m * columns.size
    same_positive = key_ids is not None and same_id == "positive"
    own_keys = _OwnKeys()
    own_offset = offset
    if positives is not None:
        own_keys = _own_keys(op, positives, n, m, device, exclude, key_bias)
    elif same_positive:
        own_offset = -n  # there are no keys at -n to -1
        if query_ids is None:
            raise ValueError(
                f"{op}: expected query_ids, got none, and no positives whose ids could be used; "
                "pass one of the two"
            )
    elif exclude is not None or offset + n > m:
        raise ValueError(
            f"{op}: expected positives, the position of each query's own key, got none with "
            + ("exclude" if exclude is not None else f"{n} queries and {m} keys")
            + "; without them query i's own key is key i"
        )
    codes: IdCodes | None = None
    if key_ids is not None:
        if query_ids is not None and ids is None:
            shapes: list[tuple[int, ...]] = [(n, 2)] if key_ids.shape == (m, 2) else [(n,), (n, 1)]
            query_ids = _integers(op, "query_ids", query_ids, shapes, device)
        codes = _codes(query_ids, key_ids, own_keys.position, offset, n, code_ids or sorted_ids)
    elif query_ids is not None:
        raise ValueError(
            f"{op}: expected key_ids with query_ids, got none; without key_ids no key has an id"
        )
    out_of_range = own_keys.out_of_range
    if exclude is not None:
        beyond = exclude >= m
        out_of_range = beyond if out_of_range is None else out_of_range | beyond
        exclude = exclude.where(~beyond, -1).clamp_min(-1).int()
    return Pairs(
        own_key=None if own_keys.position is None else own_keys.position.int(),
        offset=own_offset,
        exclude=exclude,
        query_ids=None if codes is None else codes.query,
        key_ids=None if codes is None else codes.key,
        key_bias=key_bias,
        same_positive=same_positive,
        others=own_keys.others,
        left_out=own_keys.left_out,
        out_of_range=out_of_range,
    )


class _OwnKeys(NamedTuple):
    """The own keys of N queries; None: there are none such."""

    # int64 [N], of the first; -1: none. None: query i's is key i + ``offset``.
    position: Tensor | None = None
    others: Tensor | None = None  # int64 [N, P]; -1: none
    left_out: Tensor | None = None  # bool [N]
    out_of_range: Tensor | None = None  # bool [N]


def _own_keys(
    op: str,
    positives: Any,
    n: int,
    m: int,
    device: torch.device,
    exclude: Tensor | None,
    key_bias: Tensor | None,
) -> _OwnKeys:
    """Check the argument ``positives`` and split it."""
    shapes: list[tuple[int, ...]] = [(n,)]
    several = isinstance(positives, Tensor) and positives.ndim == 2
    if several:
        shapes.append((n, max(positives.shape[1], 1)))
    positives = _integers(op, "positives", positives, shapes, device)
    left_out = positives == LEFT_OUT
    inside = (positives >= 0) & (positives < m)
    out_of_range = ~(inside | left_out)
    positions = positives.where(inside, -1)
    if not several:
        return _OwnKeys(position=positions, left_out=left_out, out_of_range=out_of_range)
    first, others = _first_and_others(positions, exclude, key_bias)
    return _OwnKeys(
        position=first,
        others=others,
        left_out=left_out.all(dim=1),
        out_of_range=out_of_range.any(dim=1),
    )


def _first_and_others(
    own_keys: Tensor, exclude: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions of own keys [N, P], -1: none -> the first that is a positive [N], and the others
    [N, P]: each once, without those that are excluded or have a bias of -inf."""
    in_order, places = own_keys.sort(dim=1, stable=True)
    repeats = F.pad(in_order[:, 1:] == in_order[:, :-1], (1, 0))
    repeated = torch.zeros_like(repeats).scatter(1, places, repeats)
    valid = (own_keys >= 0) & ~repeated
    if exclude is not None:
        valid = valid & (own_keys != exclude[:, None])
    if key_bias is not None:
        valid = valid & (F.pad(key_bias.detach(), (0, 1))[own_keys] != -torch.inf)
    first = valid.int().argmax(dim=1, keepdim=True)
    others = own_keys.where(valid, -1).scatter(1, first, -1)
    return own_keys.gather(1, first)[:, 0], others


def refuse_out_of_range(op: str, pairs: Pairs, num_keys: int) -> None:
    """Raise if a position is out of range: on a CPU and in the reference, which may read values."""
    out_of_range = pairs.out_of_range
    if out_of_range is not None and checks.readable(out_of_range) and out_of_range.any():
        raise ValueError(
            f"{op}: expected positives in [0, {num_keys}) or {LEFT_OUT} and exclude below "
            f"{num_keys}, got another at query {int(out_of_range.nonzero()[0])}; count the keys "
            "from 0"
        )


def check_ids(op: str, name: str, ids: Any, count: int, device: torch.device) -> Tensor:
    """Require integers [count] or [count, R], R <= 2; return them as int64."""
    return _integers(op, name, ids, [(count,), (count, 1), (count, 2)], device)


def _integers(
    op: str, name: str, x: Any, shapes: list[tuple[int, ...]], device: torch.device
) -> Tensor:
    x = checks.as_int64(x)
    checks.tensor(op, name, x, dtypes=checks.INTEGERS, shapes=shapes, device=device)
    return x


def _codes(
    query_ids: Tensor | None,
    key_ids: Tensor,
    own_key: Tensor | None,
    offset: int,
    n: int,
    code_ids: CodeIds,
) -> IdCodes:
    """Ids as small numbers; without query ids those of the own keys, key i + ``offset`` of query i
    without ``own_key``."""
    if query_ids is key_ids:
        codes = code_ids(None, key_ids)
        return IdCodes(codes.key, codes.key)
    codes = code_ids(query_ids, key_ids)
    if query_ids is not None:
        return codes
    if own_key is None:
        return IdCodes(codes.key[:, offset : offset + n], codes.key)
    # The padding is for queries without their own key.
    return IdCodes(F.pad(codes.key, (0, 1), value=-1)[:, own_key], codes.key)


def sorted_ids(query_ids: Tensor | None, key_ids: Tensor) -> IdCodes:
    """Codes of ids [N] or [N, R] and [M] or [M, R], without query ids [R, 0]: a key's is its id's
    first position in the sorted ids."""
    key_columns = _by_column(key_ids)  # [R, M]
    ordered = key_columns.sort(dim=1).values
    key_codes = torch.searchsorted(ordered, key_columns, out_int32=True)
    if query_ids is None:
        return IdCodes(key_codes[:, :0], key_codes)
    columns = _by_column(query_ids)
    m = key_ids.shape[0]
    if not m:
        return IdCodes(torch.full_like(columns, -1).int(), key_codes)
    position = torch.searchsorted(ordered, columns).clamp_max(m - 1)
    query_codes = position.where(ordered.gather(1, position) == columns, -1)
    return IdCodes(query_codes.int(), key_codes)


def _by_column(ids: Tensor) -> Tensor:
    return (ids[:, None] if ids.ndim == 1 else ids).T.contiguous()
