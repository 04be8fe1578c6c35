"""Retrieval examples and confusions of the evaluation set, as HTML."""

from __future__ import annotations

import html
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.evaluate import EvalSet
from protoclip.metrics import classify, zero_shot_logits
from protoclip.report.thumbs import Thumbs

ASKED = 400  # queries among which right and wrong ones are looked for
CELLS = 14  # classes up to which the whole table of confusions is shown


def retrieval_examples(one: EvalSet | None, thumbs: Thumbs, count: int = 4) -> str:
    """Right and wrong answers in both directions, spread evenly over the evaluation set."""
    if one is None or not one.captioned or len(one.text) < 2:
        return "<p class=note>The evaluation set has no captions.</p>"
    owner = one.caption_image if one.caption_image is not None else torch.arange(len(one.text))
    image, text = F.normalize(one.image, dim=1), F.normalize(one.text, dim=1)

    def caption(j: int) -> str:
        i = int(owner[j])
        earlier = int((owner[:j] == i).sum())  # the k-th row of an image is its k-th caption
        return html.escape(thumbs.caption(i, earlier))

    def to_text(i: int, best: list[int]) -> str:
        items = "".join(
            f"<li{' class=hit' if int(owner[j]) == i else ''}>{caption(j)}</li>" for j in best
        )
        truth = "" if any(int(owner[j]) == i for j in best) else own_caption(i)
        return f"<div class=query>{thumbs.tag(i)}<div><ol>{items}</ol>{truth}</div></div>"

    def own_caption(i: int) -> str:
        return f"<small>right: {html.escape(thumbs.caption(i))}</small>"

    def to_image(j: int, best: list[int]) -> str:
        found = "".join(thumbs.tag(i, kind="hit" if i == int(owner[j]) else "") for i in best)
        if int(owner[j]) not in best:
            found += f"<small class=right>right: {thumbs.tag(int(owner[j]))}</small>"
        words = f"<q>{caption(j)}</q><div class=thumbs>{found}</div>"
        return f"<div class=query><div>{words}</div></div>"

    parts = []
    for title, queries, items, show in (
        ("Image → caption", image, text, to_text),
        ("Caption → image", text, image, to_image),
    ):
        asked = every(len(queries), ASKED)
        best = (queries[asked] @ items.T).topk(min(5, len(items)), dim=1).indices
        first = best[:, 0]
        right = owner[first] == asked if show is to_text else owner[asked] == first
        for word, rows in (("right", right.nonzero()), ("wrong", (~right).nonzero())):
            rows = rows.flatten()
            body = "".join(
                show(int(asked[row]), best[row].tolist())
                for row in rows[every(len(rows), count)].tolist()
            )
            parts.append(
                f"<div><h4>{title}: {word} first answer ({len(rows) / len(asked):.0%} of "
                f"{len(asked):,} queries)</h4>{body or '<p class=note>None.</p>'}</div>"
            )
    return f"<div class=two>{''.join(parts)}</div>"


def every(total: int, count: int) -> Tensor:
    """At most ``count`` positions, evenly over ``total``."""
    if total == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def confusions(one: EvalSet | None) -> str:
    """Zero-shot: what each class was taken for, for every label with class vectors."""
    parts = []
    for label, known in one.labels.items() if one is not None else ():
        vectors = one.class_vectors.get(label) if one is not None else None
        if one is None or vectors is None:
            continue
        count = len(known.names)
        score = partial(zero_shot_logits, vectors=vectors)
        got = classify(one.image, known.ids, count, score)
        table = torch.zeros(count, count, dtype=torch.int64)
        table.index_put_((known.ids, got.guesses), torch.tensor(1), accumulate=True)
        parts.append(
            f"<h4>{html.escape(label)}: {got.acc1:.1%} right, {count} classes "
            f"(chance {1 / count:.1%})</h4>"
        )
        parts.append(_table(table, known.names) if count <= CELLS else _worst(table, known.names))
    return "".join(parts) or "<p class=note>No classes are known for the evaluation set.</p>"


def _table(table: Tensor, names: tuple[str, ...]) -> str:
    """Rows: the truth; columns: the guess; shade: share of the row."""
    share = table / table.sum(1, keepdim=True).clamp_min(1)
    heads = "".join(f"<th><span>{html.escape(name)}</span></th>" for name in names)
    rows = "".join(
        f"<tr><th>{html.escape(name)} <small>{int(table[i].sum())}</small></th>"
        + "".join(
            f'<td class="{"own" if i == j else "off"}" style="--s:{100 * share[i, j]:.0f}%">'
            f"{int(table[i, j]) or ''}</td>"
            for j in range(len(names))
        )
        + "</tr>"
        for i, name in enumerate(names)
    )
    return (
        "<div class=scroll><table class=confusion><thead><tr><th>truth \\ guess</th>"
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _worst(table: Tensor, names: tuple[str, ...], count: int = 12) -> str:
    """The commonest confusions, where a whole table would be too wide."""
    wrong = table.clone().fill_diagonal_(0)
    values, places = wrong.flatten().topk(min(count, wrong.numel()))
    rows = "".join(
        f"<tr><td>{html.escape(names[p // len(names)])}</td>"
        f"<td>{html.escape(names[p % len(names)])}</td><td class=num>{v}</td></tr>"
        for v, p in zip(values.tolist(), places.tolist(), strict=True)
        if v
    )
    return (
        "<div class=scroll><table><thead><tr><th>truth</th><th>taken for</th><th>times</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
