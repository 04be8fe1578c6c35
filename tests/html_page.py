"""A page of HTML as a tree, for tests that ask what it shows rather than how it is written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
NOT_SHOWN = {"script", "style", "template"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it shows, with single spaces."""
        return " ".join("".join(self._texts()).split())

    @property
    def source(self) -> str:
        """The text inside, as of a script, unchanged."""
        return "".join(child for child in self.children if isinstance(child, str))

    def _texts(self) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            elif child.tag not in NOT_SHOWN:
                yield from child._texts()
                yield " "

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """The elements inside with this tag and these attributes, in order; ``class_`` is one of
        the classes."""
        return [element for element in self._inside() if element.matches(tag, attributes)]

    def one(self, tag: str = "", **attributes: str) -> Element:
        """The only such element."""
        elements = self.all(tag, **attributes)
        assert len(elements) == 1, f"{len(elements)} elements {tag} {attributes}"
        return elements[0]

    def matches(self, tag: str, attributes: dict[str, str]) -> bool:
        if tag and tag != self.tag:
            return False
        for name, value in attributes.items():
            if name == "class_":
                if value not in self.attributes.get("class", "").split():
                    return False
            elif self.attributes.get(name) != value:
                return False
        return True

    def _inside(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._inside()

    def section(self, name: str) -> Element:
        return self.one("section", id=name)

    @property
    def sections(self) -> list[str]:
        return [section.attributes["id"] for section in self.all("section")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Element("page", {})
        self._open = [self.page]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def read_page(path: Path) -> Element:
    """The whole page; every element must be closed."""
    return parse_page(path.read_text(encoding="utf-8"))


def parse_page(text: str) -> Element:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader._open == [reader.page], f"<{reader._open[-1].tag}> is not closed"
    return reader.page


def pictures_in(page: Element) -> list[str]:
    """The thumbnails of galleries and maps; the browser puts them where they belong."""
    scripts = [
        script
        for script in page.all("script", type="application/json")
        if script.attributes.get("id", "").startswith("pictures of ")
    ]
    assert scripts
    return [picture for script in scripts for picture in json.loads(script.source)]


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    return next(filter(None, map(shutil.which, names)), None)


needs_browser = pytest.mark.skipif(
    browser() is None, reason="no Chromium here; Debian: apt-get install chromium"
)


def in_browser(path: Path, script: str, folder: Path) -> Any:
    """What a script that is added to a page writes, as JSON, into ``<pre id=state>``, in a window
    that is narrow and dark; fails if the page logs an error. ``folder``: for its own files."""
    copy = folder / "with-script.html"
    copy.write_text(path.read_text().replace("</body>", script + "</body>"))
    shown = subprocess.run(
        [
            str(browser()), "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--dump-dom",
            "--virtual-time-budget=8000", "--enable-logging=stderr", "--window-size=500,2400",
            "--blink-settings=preferredColorScheme=0", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr, shown.stderr[-2000:]  # where errors are logged
    return json.loads(parse_page(shown.stdout).one("pre", id="state").text)
