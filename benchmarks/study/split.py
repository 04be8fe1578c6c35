"""What the study trains on and what it is judged on: sets and concepts held out, duplicates out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.study.data import Icons, family_of, near
from protoclip.common.seeds import mix

# Sets of different looks, one of a family, chosen by hand before any run.
TEST_SETS = (
    "bytesize", "carbon", "clarity", "dashicons", "entypo", "f7", "flat-color-icons", "game-icons",
    "grommet-icons", "icomoon-free", "iconoir", "majesticons", "marketeq", "pixelarticons",
    "si-glyph", "simple-line-icons", "system-uicons", "teenyicons", "typcn", "vaadin",
)  # fmt: skip
TUNING_SETS = (
    "basil", "dinkie-icons", "duo-icons", "fontisto", "foundation", "gg", "jam", "lets-icons",
    "mage", "octicon", "whh", "zondicons",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The numbers of the split."""

    test_sets: tuple[str, ...] = TEST_SETS
    tuning_sets: tuple[str, ...] = TUNING_SETS
    judged_in: int = 4  # of the 20 sets held out draw a concept, at least
    tuned_in: int = 2  # of the 12 sets for tuning
    trained_in: int = 20  # sets for training that draw it, at least
    new_concepts: int = 70
    most_related: int = 400  # training icons that a new concept may take away
    near_bits: int = 12  # of 264, at most: two drawings no farther apart are the same
    labelled: int = 12  # training icons of a concept for probe and neighbours, at most
    queries: int = 2000  # icons for retrieval, each with other words


@dataclass(frozen=True)
class Split:
    """Rows of the icons by what they are for; concepts are numbered in ``seen`` and ``new``."""

    pool: np.ndarray  # int64: a run trains on a sample of them
    seen: tuple[str, ...]  # concepts that training sets draw too
    new: tuple[str, ...]  # concepts never trained on, nor any name that contains their words
    judged_seen: np.ndarray  # icons of seen concepts in the sets held out
    judged_new: np.ndarray
    labelled_seen: np.ndarray  # icons of the training sets, for the probe and neighbours
    labelled_new: np.ndarray
    queries: np.ndarray  # icons of the sets held out, all of different words
    counts: Mapping[str, int] = field(default_factory=dict)  # for the page


def by_lot(values: np.ndarray, *salt: int) -> np.ndarray:
    """The values in an order that depends on them and the salt alone."""
    return values[np.argsort(mix(*salt, values), kind="stable")]


def make_split(icons: Icons, rules: Rules, *, tuning: bool) -> Split:
    """The split for the results, or the one for tuning; their sets and concepts are disjoint."""
    test = Groups(icons, rules.test_sets, rules)
    new = choose_new(test, rules, frozenset())
    if tuning:
        away = test.families
        rules = replace(rules, judged_in=rules.tuned_in)
        groups = Groups(icons, rules.tuning_sets, rules, without=away)
        new = choose_new(groups, rules, frozenset(new))
    else:
        groups = test
    return groups.split(new)


class Groups:
    """The icons of the sets held out, and those of the sets that have nothing to do with them."""

    def __init__(
        self,
        icons: Icons,
        held_out: Iterable[str],
        rules: Rules,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.icons, self.rules = icons, rules
        self.families = frozenset(map(family_of, held_out))
        family = np.array([family_of(name) for name in icons.set.tolist()])
        self.judged = np.flatnonzero(np.isin(icons.set, list(held_out)))
        self.others = np.flatnonzero(~np.isin(family, list(self.families | without)))
        self.judged_sets = self._sets(self.judged)
        self.other_sets = self._sets(self.others)

    def _sets(self, rows: np.ndarray) -> dict[str, int]:
        """How many sets draw each name; a set has a name once."""
        names, counts = np.unique(self.icons.words[rows], return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def concepts(self) -> list[str]:
        """Names that enough sets on both sides draw, in alphabetic order."""
        rules = self.rules
        return [
            name
            for name, count in self.judged_sets.items()
            if count >= rules.judged_in and self.other_sets.get(name, 0) >= rules.trained_in
        ]

    def split(self, new: tuple[str, ...]) -> Split:
        """The split with these new concepts."""
        icons, rules = self.icons, self.rules
        seen = tuple(name for name in self.concepts() if name not in new)
        related = self.others[contains(icons.words[self.others], new)]
        pool = np.setdiff1d(self.others, related)
        doubles = copies(icons, pool)
        pool = np.setdiff1d(pool, doubles)
        across = near_rows(icons, self.judged, pool, rules.near_bits)
        pool = np.setdiff1d(pool, across)

        def of(rows: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
            wanted = frozenset(names)
            return rows[[word in wanted for word in icons.words[rows].tolist()]]

        labelled_new = of(related, new)
        clash = near_rows(icons, of(self.judged, new), labelled_new, rules.near_bits)
        labelled_new = np.setdiff1d(labelled_new, clash)
        unique = np.unique(icons.words[self.judged], return_index=True)[1]
        counts = {
            "held-out icons": len(self.judged),
            "icons of other families": len(self.others),
            "related to new concepts": len(related),
            "copies in other sets": len(doubles),
            "near-duplicates of held-out icons": len(across),
            "pool": len(pool),
        }
        return Split(
            pool=pool,
            seen=seen,
            new=new,
            judged_seen=of(self.judged, seen),
            judged_new=of(self.judged, new),
            labelled_seen=few_each(icons, of(pool, seen), rules.labelled),
            labelled_new=few_each(icons, labelled_new, rules.labelled),
            queries=np.sort(by_lot(self.judged[unique], 1)[: rules.queries]),
            counts=counts,
        )


def choose_new(groups: Groups, rules: Rules, taken: frozenset[str]) -> tuple[str, ...]:
    """Concepts to hold out, by lot among those that take few icons away."""
    names = [name for name in groups.concepts() if name not in taken]
    related = related_rows(groups.icons.words[groups.others], names)
    few = [name for name in names if len(related[name]) <= rules.most_related]
    lots = [int(mix(20261127, *name.encode())) for name in few]
    order = np.argsort(np.array(lots, dtype=np.uint64), kind="stable")
    return tuple(sorted(few[i] for i in order[: rules.new_concepts]))


def related_rows(words: np.ndarray, names: Iterable[str]) -> dict[str, set[int]]:
    """For each of ``names`` the positions in ``words`` that contain all its words."""
    by_word: dict[str, set[int]] = {}
    for i, icon_words in enumerate(words.tolist()):
        for word in icon_words.split(" "):
            by_word.setdefault(word, set()).add(i)
    rows_by_name = {}
    for name in names:
        parts = [by_word.get(word, set()) for word in name.split(" ")]
        rows_by_name[name] = parts[0].intersection(*parts[1:])
    return rows_by_name


def contains(words: np.ndarray, names: Iterable[str]) -> np.ndarray:
    """Which of the names contain all words of at least one of ``names``: bool [N]."""
    mask = np.zeros(len(words), dtype=bool)
    for rows in related_rows(words, names).values():
        mask[list(rows)] = True
    return mask


def copies(icons: Icons, rows: np.ndarray) -> np.ndarray:
    """The rows whose words and drawing an earlier row has."""
    keys = [
        (words, bits.tobytes())
        for words, bits in zip(icons.words[rows].tolist(), icons.hashes[rows], strict=True)
    ]
    first: dict[tuple[str, bytes], int] = {}
    for row, key in zip(rows.tolist(), keys, strict=True):
        first.setdefault(key, row)
    first_rows = np.fromiter(first.values(), dtype=np.int64)
    return np.setdiff1d(rows, first_rows)


def near_rows(icons: Icons, judged: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """Those of ``rows`` that are drawn like one of ``judged``."""
    near_places = [places for _, places in near(icons.hashes[judged], icons.hashes[rows], bits)]
    return rows[np.unique(np.concatenate(near_places))] if near_places else rows[:0]


def few_each(icons: Icons, rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows of each name, by lot."""
    count: dict[str, int] = {}
    chosen = []
    for row in by_lot(rows, 2).tolist():
        name = str(icons.words[row])
        count[name] = count.get(name, 0) + 1
        if count[name] <= most:
            chosen.append(row)
    return np.sort(np.array(chosen, dtype=np.int64))
