"""The names of what can be measured."""

from __future__ import annotations

from collections.abc import Sequence

from protoclip.evaluate.layouts import Layout

TASKS = ("zeroshot", "retrieval", "linear_probe", "knn", "grouping", "geometry")
PROBES = frozenset(("linear_probe", "knn"))
PROTOCOLS = ("heldout", "paper")


def parse_tasks(text: str) -> tuple[str, ...]:
    """ "zeroshot,knn" -> those tasks in order; "all" -> all of them.

    Raises:
        ValueError: an unknown task, or none.
    """
    if text == "all":
        return TASKS
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise ValueError(
            f"--tasks: expected all, or some of {','.join(TASKS)}; got {text!r}"
            + (f", of which {unknown[0]!r} is unknown" if unknown else "")
        )
    return tuple(name for name in TASKS if name in wanted)


def impossible(tasks: Sequence[str], layout: Layout) -> dict[str, str]:
    """Why each task that the data does not allow cannot be done, by task."""
    labelled = bool(layout.test.labels)
    no_label = "" if labelled else "the data has no single class per picture"
    reasons = {task: no_label for task in ("linear_probe", "knn", "grouping")}
    if not labelled and layout.targets is None:
        reasons["zeroshot"] = "the data has no classes"
    if not layout.captioned:
        reasons["retrieval"] = "the data has no captions"
    reasons |= layout.problems
    return {task: reasons[task] for task in tasks if reasons.get(task)}
