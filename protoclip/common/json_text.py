"""Reading JSON that anybody may have written."""

from __future__ import annotations

import contextlib
import json
from typing import Any

JSON_LEVELS = 100  # lists and objects inside each other


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: not JSON, or lists and objects inside each other beyond ``JSON_LEVELS``, which
            Python's own functions end with a RecursionError.
    """
    with contextlib.suppress(RecursionError):
        content = json.loads(text)
        level = [content]
        for _ in range(JSON_LEVELS):
            inner = [item for item in level if isinstance(item, list | dict)]
            level = [x for item in inner for x in (item.values() if type(item) is dict else item)]
            if not level:
                return content
    raise ValueError(f"expected JSON of at most {JSON_LEVELS} levels, got deeper nesting")
