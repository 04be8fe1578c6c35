"""The example in the docstring of each public function and class, which docs/api.md shows."""

import doctest

import pytest
import torch

import protoclip

pytestmark = pytest.mark.smoke

# Values that other examples show, and what OpenCLIP's trainer calls.
WITHOUT = {"Bank", "PrototypeLosses", "ProtoConfig", "create_loss", "create_task"}


@pytest.mark.parametrize("name", sorted(set(protoclip.__all__) - WITHOUT))
def test_the_example_runs(name: str) -> None:
    value = getattr(protoclip, name)
    names = {"torch": torch, "protoclip": protoclip}
    example = doctest.DocTestParser().get_doctest(value.__doc__, names, name, None, None)
    assert example.examples, f"protoclip.{name} has no example"
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
