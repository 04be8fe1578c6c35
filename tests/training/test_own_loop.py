"""docs/own-loop.md as it stands: prototypes in a loop of plain PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import protoclip

PAGE = Path(protoclip.__file__).parents[1] / "docs" / "own-loop.md"


def test_two_short_episodes_lower_both_losses() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert 60 <= len(code.splitlines()) <= 80
    names: dict = {"__name__": "own_loop"}
    exec(compile(code, str(PAGE), "exec"), names)
    clip, prototypes = zip(*names["losses"], strict=True)
    assert clip[0] > clip[1] > clip[2]
    assert prototypes[0] == 0 and prototypes[1] > prototypes[2] > 0
