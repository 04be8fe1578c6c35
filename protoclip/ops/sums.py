"""What the options of the losses need: mean logits over the sets of ``pairs.py``, and logits of a
few keys of each query. No kernels, and no [N, M] logits.

A mean of dot products is one dot product, s q_i.(sum of the keys) / count, so O((N + M) D) is
enough. S_i comes from the sum over all keys, minus the keys of the query's id, plus its own keys
among those, minus the excluded one; with two columns of ids by inclusion and exclusion. The sums
are fp64: nothing is lost where they cancel, and indexed sums of fp64 have one order on any device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.ops.operators import accumulator, without_autocast
from protoclip.ops.pairs import Pairs

AT_ONCE = 4  # rows of a query that are gathered together
LN2 = math.log(2.0)  # kernels count in base-2 logits, losses in nats


def smoothing(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    negative_logits: Tensor | None = None,
) -> Tensor:
    """Mean logit of each query's positives minus that of all it sees, [N]: label smoothing adds
    it, times epsilon, to the loss. ``negative_logits`` [N, H]: of keys that only this query
    sees."""
    if pairs.plain and negative_logits is None:  # a mean of keys is a key
        x, y = (rows.to(accumulator(queries)) for rows in (queries, keys))
        own_keys = y[pairs.offset : pairs.offset + x.shape[0]]
        return logit_scale.to(x.dtype).reshape(()) * (x * (own_keys - y.mean(dim=0))).sum(dim=1)
    sums = KeySums(queries, keys, pairs)
    positive, num_positives = _logits(queries, logit_scale, sums.positive())
    seen, num_seen = _logits(queries, logit_scale, sums.seen())
    if negative_logits is not None:
        seen = seen + negative_logits.sum(dim=1)
        num_seen = num_seen + negative_logits.shape[1]
    difference = positive / num_positives.clamp_min(1) - seen / num_seen.clamp_min(1)
    return difference.to(accumulator(queries))


class Positives(NamedTuple):
    """Of each query, [N]."""

    mean: Tensor  # logit, 0 without any
    number: Tensor


def positive_means(queries: Tensor, keys: Tensor, logit_scale: Tensor, pairs: Pairs) -> Positives:
    """The mean logit of each query's positives, without the log-sum-exp over what it sees."""
    total, count = _logits(queries, logit_scale, KeySums(queries, keys, pairs).positive())
    return Positives((total / count.clamp_min(1)).to(accumulator(queries)), count)


def signed_sums(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs
) -> Tensor:
    """Sum of SigLIP's logits of each image's positives minus that of its negatives, [N]."""
    sums = KeySums(x, y, pairs)
    bias = logit_bias.double().reshape(())
    positive, num_positives = _logits(x, logit_scale, sums.positive())
    seen, num_seen = _logits(x, logit_scale, sums.seen())
    total = 2 * (positive + bias * num_positives) - (seen + bias * num_seen)
    return total.to(accumulator(x))


def add_positives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    loss_per_query: Tensor,
    positive_mean: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses and means of the first own keys -> those of all own keys, [N] each."""
    others = pairs.others
    assert others is not None
    sums = KeySums(queries, keys, pairs)
    total, count = _logits(queries, logit_scale, sums.positive())
    all_mean = (total / count.clamp_min(1)).to(positive_mean.dtype)
    loss = loss_per_query + (positive_mean - all_mean)
    if pairs.query_ids is None or pairs.same_positive:
        return loss, all_mean
    # Keys of the query's id are not seen, but own keys are.
    hidden = others.where(of_same_id(pairs, others), -1)
    rows = sums.at_each(hidden)  # [N, P, D + 2]
    dots = torch.bmm(rows[:, :, :-2], queries.double()[:, :, None])[:, :, 0]
    logits = logit_scale.double().reshape(()) * dots + rows[:, :, -2]
    adds = hidden >= 0
    # Finite where there is nothing to add: a gradient of -inf - -inf is NaN, even times 0.
    added = logits.where(adds, -1e30).logsumexp(dim=1) - all_mean
    any_adds = adds.any(dim=1)
    added = added.where(any_adds, 0).to(loss.dtype)
    return log_add(loss, added).where(any_adds, loss), all_mean


def log_add(loss: Tensor, added: Tensor) -> Tensor:
    """``logaddexp``, with second derivatives even where the two are far apart."""
    return loss - F.logsigmoid(loss - added)


def logits_of_negatives(queries: Tensor, negatives: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits [N, H] of queries [N, D] and of keys [N, H, D] that only they see."""
    acc_dtype = accumulator(queries)
    with without_autocast(queries.device.type):
        dots = torch.bmm(negatives.to(acc_dtype), queries.to(acc_dtype)[:, :, None])[:, :, 0]
    return logit_scale.to(acc_dtype).reshape(()) * dots


def _logits(queries: Tensor, logit_scale: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the logits and number of the keys, for ``sums`` [N, D + 2] of ``KeySums``: [N]."""
    d = queries.shape[1]
    dots = (queries.double() * sums[:, :d]).sum(dim=1)
    return logit_scale.double().reshape(()) * dots + sums[:, d], sums[:, d + 1]


class KeySums:
    """Sums of the rows (key, bias, 1) over each query's sets, fp64 [N, D + 2]."""

    def __init__(self, queries: Tensor, keys: Tensor, pairs: Pairs) -> None:
        self._pairs = pairs
        # [N, P], not excluded; -1: none
        self._own = pairs.own_positions(queries)[:, None].long()
        if pairs.others is not None:
            self._own = torch.cat([self._own, pairs.others], dim=1)
        if pairs.exclude is not None:
            self._own = self._own.where(self._own != pairs.exclude[:, None], -1)
        rows = keys.double()
        count = rows.new_ones((keys.shape[0], 1))
        if pairs.key_bias is None:
            rows = torch.cat([rows, torch.zeros_like(count), count], dim=1)
        else:
            rows = torch.cat([rows, pairs.key_bias.double()[:, None], count], dim=1)
            rows = rows.where((pairs.key_bias != -torch.inf)[:, None], 0)
        self._rows = F.pad(rows, (0, 0, 0, 1))  # the last row is of "none"

    def seen(self) -> Tensor:
        """The sums over S_i, the keys that a query sees."""
        pairs = self._pairs
        total = self._rows.sum(dim=0).expand(self._own.shape[0], -1)
        if pairs.query_ids is None or pairs.same_positive:
            return total - self._at(pairs.exclude) if pairs.exclude is not None else total
        seen = total - self._same() + self._at(self._own.where(of_same_id(pairs, self._own), -1))
        if pairs.exclude is None:
            return seen
        exclude = pairs.exclude[:, None]
        return seen - self._at(exclude.where(~of_same_id(pairs, exclude), -1))

    def positive(self) -> Tensor:
        """The sums over P_i, its positives."""
        pairs = self._pairs
        if pairs.query_ids is None or not pairs.same_positive:
            return self._at(self._own)
        positive = self._same() + self._at(self._own.where(~of_same_id(pairs, self._own), -1))
        if pairs.exclude is None:
            return positive
        exclude = pairs.exclude[:, None]
        return positive - self._at(exclude.where(of_same_id(pairs, exclude), -1))

    def _at(self, positions: Tensor) -> Tensor:
        """Sum of the rows at positions [N] or [N, P]; -1: none."""
        if positions.ndim == 1:
            positions = positions[:, None]
        first, *others = positions.split(AT_ONCE, dim=1)
        total = self.at_each(first).sum(dim=1)
        for part in others:
            total = total + self.at_each(part).sum(dim=1)
        return total

    def at_each(self, positions: Tensor) -> Tensor:
        """The rows at positions [N, P], [N, P, D + 2]; zeros at -1."""
        return self._rows[self._row_of(positions)]

    def _row_of(self, positions: Tensor) -> Tensor:
        return positions.where(positions >= 0, self._rows.shape[0] - 1).long()

    def _same(self) -> Tensor:
        """The sums over the keys with the query's id."""
        assert self._pairs.query_ids is not None and self._pairs.key_ids is not None
        query_ids = self._pairs.query_ids.long()
        key_ids = self._pairs.key_ids.long()
        same = self._of_code(query_ids[0], key_ids[0])
        if query_ids.shape[0] == 1:
            return same
        # A key that both columns match would count twice.
        num_codes = self._rows.shape[0]
        query_pair = query_ids[0] * num_codes + query_ids[1]
        query_pair = query_pair.where((query_ids >= 0).all(dim=0), -1)
        key_pair = key_ids[0] * num_codes + key_ids[1]
        query_codes, key_codes = _codes_of(query_pair, key_pair)
        in_both = self._of_code(query_codes, key_codes)
        return same + self._of_code(query_ids[1], key_ids[1]) - in_both

    def _of_code(self, query_codes: Tensor, key_codes: Tensor) -> Tensor:
        """Sum over the keys of each query's code; codes are in [0, M), -1 is in no set."""
        sums = torch.zeros_like(self._rows)
        sums = sums.index_put((key_codes,), self._rows[:-1], accumulate=True)
        return sums[self._row_of(query_codes)]


def of_same_id(pairs: Pairs, positions: Tensor) -> Tensor:
    """Whether the keys at positions [N, P] have the query's id; -1 has none."""
    assert pairs.query_ids is not None and pairs.key_ids is not None
    padded = F.pad(pairs.key_ids, (0, 1), value=-2)  # a query's missing id is -1
    at = positions.where(positions >= 0, pairs.key_ids.shape[1]).long()
    return (padded[:, at] == pairs.query_ids[:, :, None]).any(dim=0)


def _codes_of(query_values: Tensor, key_values: Tensor) -> tuple[Tensor, Tensor]:
    """Values as positions in the sorted values of the keys; -1 where no key has a query's."""
    ordered = key_values.sort().values
    key_codes = torch.searchsorted(ordered, key_values)
    padded = F.pad(ordered, (0, 1), value=-2)  # so that M = 0 is not a special case
    position = torch.searchsorted(ordered, query_values)
    return position.where(padded[position] == query_values, -1), key_codes
