"""What every run reads at its start, read once a process: OpenCLIP's vocabulary, and the template
of the report. Ranks are forked from a process that has imported this."""

from __future__ import annotations

import copy
import functools
from typing import Any

import open_clip.factory
from open_clip.tokenizer import SimpleTokenizer

from protoclip.report.page import environment


@functools.cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenizer(context_length: int = 77, **options: Any) -> SimpleTokenizer:
    """One of its own that shares the vocabulary, which takes a fifth of a second to read."""
    if options:
        return SimpleTokenizer(context_length=context_length, **options)
    made = copy.copy(_tokenizer())
    made.context_length = context_length
    return made


open_clip.factory.SimpleTokenizer = tokenizer
tokenizer()
environment().get_template("page.html.j2")
