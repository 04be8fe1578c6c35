"""``builtin:icons``: drawings of several icon families with their names, from data-only packages.

One concept drawn by many hands is the point: "anchor" occurs in every family. One family is never
trained on, and a tenth of the concepts is held out in all of them. ``load_icons`` and
``IconDataset`` serve any other collection of named SVG drawings too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from protoclip.common.files import DataError, write_atomic
from protoclip.common.paths import cache_dir
from protoclip.common.strings import StringTable
from protoclip.data.images import draw_svgs
from protoclip.data.types import Labels, PairDataset, labels_of

SIDE = 48  # pixels
WEIGHTS = 4  # most drawings of one name in one family
HELDOUT_FAMILY = "lucide"
HELDOUT_PERCENT = 10  # of the concepts, in all families
DRAWING = 1  # part of the cache's key: raise it when the same packages give other pictures or words
# Words at the end of a name that say how, not what.
STYLE_WORDS = frozenset(("outline", "outlined", "solid", "filled", "variant", "alt", "duotone"))
# First words of names whose sign has no meaning to learn: companies, products, languages.
BRANDS = """
    android angularjs ansible atlassian aws babel bitbucket bootstrap bulma centos codepen
    codesandbox cordova cryengine debian deviantart disqus docker dribbble dropbox drupal emby
    eslint ethereum evernote facebook fedora figma firebase firefox freebsd gatsby gentoo github
    gitlab gmail gnome gog goodreads google graphql hubspot hulu instagram iobroker jabber jira
    jquery jsfiddle kickstarter kodi kubernetes laravel lastpass linkedin linux litecoin lumx
    manjaro mapbox mastodon microsoft minecraft nativescript netflix nintendo nix nodejs npm nuxt
    odnoklassniki onepassword openid pandora patreon pinterest plex qqchat quora reddit redhat
    rollupjs salesforce sass sina skype slack snapchat sony soundcloud spotify stackexchange
    stackoverflow stackpath steam symfony tailwind teamviewer telegram terraform tiktok trello
    twitch twitter ubisoft ubuntu umbraco unity unreal vimeo vlc vuejs vuetify waze webpack wechat
    whatsapp wikipedia wordpress xamarin yahoo youtube zend
"""
BRAND_NAMES = re.compile(  # names whose first word also means something else
    "apple-(finder|icloud|ios|keyboard.*|safari)|digital-ocean|electron-framework|git|language-.+|"
    "material-(design|ui)|pix|polymer|react|stack-(exchange|overflow)|.*-logo"
)


@dataclass(frozen=True)
class Icon:
    """A named drawing that has not been drawn yet."""

    family: str
    style: str  # weight or variant within the family; "" if it has only one
    name: str  # as the family spells it, in words joined by hyphens
    svg: str
    tags: tuple[str, ...] = ()  # other words for what it shows
    category: str = ""


class IconDataset(PairDataset):
    """Drawn icons: pictures in a memory-mapped file, and a table of what is known of each.

    Attributes:
        keys: "FAMILY/STYLE/NAME", or "FAMILY/NAME".
        labels: "concept", the name without style words, and "category", -1 where unknown.
        families: the family of each icon; not in ``labels``, because no model should tell them
            apart.
    """

    def __init__(
        self,
        name: str,
        pictures: np.ndarray,
        rows: Sequence[int] | np.ndarray,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        families: Labels,
        labels: Mapping[str, Labels],
    ) -> None:
        """``pictures``, uint8 [P, S, S, 3], has the picture of icon i at ``rows[i]``."""
        self.name = name
        self.pictures = pictures
        self.rows = np.asarray(rows, dtype=np.int64)
        self.keys: Sequence[str] = StringTable(keys)
        self._captions = StringTable("\n".join(icon_captions) for icon_captions in captions)
        self.families = families
        self.labels: Mapping[str, Labels] = labels

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the name of the pictures' file instead of its content."""
        state = dict(vars(self))
        if isinstance(self.pictures, np.memmap) and self.pictures.filename:
            state["pictures"] = os.fspath(self.pictures.filename)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self.pictures, str):
            self.pictures = np.load(self.pictures, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pictures[self.rows[i]])

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(self._captions[i].split("\n"))


def load_icons(name: str, state: str, read: Callable[[], Sequence[Icon]]) -> IconDataset:
    """Drawn icons from the cache folder; reads and draws them if they are not there.

    Icons that cannot be drawn, brands, pictures that an earlier icon has too, and more than
    ``WEIGHTS`` drawings of one name in one family are left out.

    Args:
        name: of the data set, and the beginning of the files' names.
        state: names what ``read`` returns, such as packages with versions; a new state is drawn
            again.
        read: the icons, in order of preference; called only if they are not in the cache.
    """
    digest = hashlib.sha256(repr((DRAWING, SIDE, state)).encode()).hexdigest()[:16]
    stem = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}"
    table, drawn = (cache_dir() / f"{stem}.{ending}" for ending in ("json", "npy"))
    table.parent.mkdir(parents=True, exist_ok=True)
    if not table.is_file():  # written last; the folder may be another user's
        with FileLock(cache_dir() / f"{stem}.lock"):  # one process draws, the others wait
            if not table.is_file():
                icons = read()
                pictures = draw_svgs([icon.svg for icon in icons], drawn, SIDE)
                write_atomic(table, json.dumps(_describe(icons, pictures), ensure_ascii=False))
    description = json.loads(table.read_text(encoding="utf-8"))
    labels = {
        label: Labels(torch.tensor(description[label]["ids"]), tuple(description[label]["names"]))
        for label in ("family", "concept", "category")
    }
    families = labels.pop("family")
    pictures = np.load(drawn, mmap_mode="r")
    return IconDataset(
        name=name,
        pictures=pictures,
        rows=description["rows"],
        keys=description["keys"],
        captions=description["captions"],
        families=families,
        labels=labels,
    )


def _describe(icons: Sequence[Icon], pictures: np.ndarray) -> dict[str, object]:
    """The table of the icons that are kept, for JSON."""
    concepts = concepts_of(icons)
    chosen: list[int] = []
    seen: set[bytes] = set()
    times: Counter[tuple[str, str]] = Counter()
    for i, (icon, concept) in enumerate(zip(icons, concepts, strict=True)):
        content = hashlib.sha256(pictures[i].tobytes()).digest()
        blank = pictures[i].min() == pictures[i].max()
        weights = times[icon.family, concept]
        if is_brand(icon.name) or blank or content in seen or weights == WEIGHTS:
            continue
        chosen.append(i)
        seen.add(content)
        times[icon.family, concept] += 1
    tags: dict[str, dict[str, None]] = {}
    category: dict[str, str] = {}
    for icon, concept in zip(icons, concepts, strict=True):  # known by one family, true of all
        tags.setdefault(concept, {}).update(dict.fromkeys(icon.tags))
        category[concept] = category.get(concept) or icon.category
    names = sorted({name for name in category.values() if name})
    chosen_concepts = [concepts[i] for i in chosen]
    families = labels_of([icons[i].family for i in chosen])
    concept_labels = labels_of(chosen_concepts)
    return {
        "rows": chosen,
        "keys": [_key(icons[i]) for i in chosen],
        "captions": [
            captions_of(concept, tags[concept], category[concept]) for concept in chosen_concepts
        ],
        "family": {"ids": families.ids.tolist(), "names": families.names},
        "concept": {"ids": concept_labels.ids.tolist(), "names": concept_labels.names},
        "category": {
            "ids": [names.index(category[c]) if category[c] else -1 for c in chosen_concepts],
            "names": names,
        },
    }


def _key(icon: Icon) -> str:
    return "/".join(filter(None, (icon.family, icon.style, icon.name)))


def captions_of(concept: str, tags: Sequence[str] | Mapping[str, None], category: str) -> list[str]:
    """The name first, then with each tag, all tags, and the category."""
    words = [tag for tag in tags if tag and tag != concept]
    captions = [concept, *(f"{concept}, {word}" for word in words), ", ".join(words)]
    captions.append(f"{concept}, {category}" if category else "")
    return list(dict.fromkeys(filter(None, captions)))


def concepts_of(icons: Sequence[Icon]) -> list[str]:
    """What each icon shows: its name in words, without style words and numbers of a variant."""
    names_of_family: dict[str, set[str]] = {}
    for icon in icons:
        names_of_family.setdefault(icon.family, set()).add(icon.name)
    return [_concept(icon.name, names_of_family[icon.family]) for icon in icons]


def _concept(name: str, names: set[str]) -> str:
    words = name.split("-")
    while len(words) > 1 and words[-1] in STYLE_WORDS:
        words.pop()
    root = "-".join(words[:-1])
    # "trash-2" is another drawing of "trash"; "heading-2" is not one of "heading".
    if re.fullmatch("[2-9]", words[-1]) and root in names and f"{root}-1" not in names:
        words.pop()
    return " ".join(words)


def is_brand(name: str) -> bool:
    """Whether a name is that of a company or product."""
    return name.split("-")[0] in BRANDS.split() or BRAND_NAMES.fullmatch(name) is not None


def is_heldout(concept: str) -> bool:
    """Whether a concept is held out in all families: the same ones in every version and run."""
    digest = hashlib.sha256(concept.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def heldout_concepts(dataset: IconDataset) -> np.ndarray:
    """Which icons show a concept that is held out, bool [N]."""
    concepts = dataset.labels["concept"]
    return np.array([is_heldout(name) for name in concepts.names])[concepts.ids.numpy()]


def in_heldout_family(dataset: IconDataset) -> np.ndarray:
    """Which icons are of the family that is never trained on, bool [N]."""
    family = dataset.families.names.index(HELDOUT_FAMILY)
    return dataset.families.ids.numpy() == family


def _folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        return Path(place)
    raise DataError(f"builtin:icons needs {package}; pip install {PACKAGES[package]}")


def _phosphor() -> Iterator[Icon]:
    folder = _folder("py_phosphor_icons")
    facts = json.loads((folder / "search" / "metadata.json").read_text(encoding="utf-8"))
    for style in ("regular", "fill", "duotone", "bold"):
        for fact in facts:
            name = fact["name"]
            ending = "" if style == "regular" else f"-{style}"
            path = folder / "svgs" / "flat" / style / f"{name}{ending}.svg"
            if path.is_file():
                tags = tuple(tag.strip("*").replace("_", " ").lower() for tag in fact["tags"])
                tags = tuple(tag for tag in tags if re.fullmatch("[a-z0-9 &'-]+", tag))
                svg = path.read_text(encoding="utf-8")
                yield Icon(
                    "phosphor", style, name, svg, tags, (fact["figma_category"] or "").lower()
                )


def _family(
    family: str, package: str, archive: str, styles: Sequence[str]
) -> Callable[[], Iterator[Icon]]:
    """Reads the drawings in a package's archive, style by style."""

    def read() -> Iterator[Icon]:
        with zipfile.ZipFile(_folder(package) / archive) as opened:
            names = sorted(opened.namelist())
            for style in styles:
                for path in names:
                    folder, _, file = path.rpartition("/")
                    if folder == style and file.endswith(".svg"):
                        name = file.removesuffix(".svg").replace("_", "-").lower()
                        yield Icon(family, style, name, opened.read(path).decode("utf-8"))

    return read


# Package -> its name in the registry; the held-out family is the last, so that a picture which
# another family has too is trained on and not tested.
PACKAGES = {
    "py_phosphor_icons": "py-phosphor-icons",
    "justmyresource_font_awesome": "justmyresource-font-awesome",
    "heroicons": "heroicons",
    "justmyresource_lucide": "justmyresource-lucide",
}
FAMILIES: Mapping[str, Callable[[], Iterator[Icon]]] = {
    "phosphor": _phosphor,
    "font-awesome": _family(
        "font-awesome", "justmyresource_font_awesome", "icons.zip", ("solid", "regular")
    ),
    "heroicons": _family(
        "heroicons", "heroicons", "heroicons.zip", ("outline", "solid", "mini", "micro")
    ),
    HELDOUT_FAMILY: _family(HELDOUT_FAMILY, "justmyresource_lucide", "icons.zip", ("",)),
}


@functools.cache
def builtin_icons() -> IconDataset:
    """All icons of the installed packages; drawn once per machine."""
    for package in PACKAGES:
        _folder(package)
    state = ";".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES.values())
    return load_icons(
        "builtin:icons",
        state,
        lambda: [icon for icons in FAMILIES.values() for icon in icons()],
    )
