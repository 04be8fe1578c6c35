"""soft_targets against its formula and by hand."""

import math

import pytest
import torch

import protoclip


def test_two_clusters_by_hand():
    source = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    prototypes = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-2.0))  # tau = 0.5: logits 2 and 0
    expected = [[p * 1 + (1 - p) * 3], [(1 - p) * 1 + p * 3]]
    got = protoclip.soft_targets(source, prototypes, 0.5)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_temperature_means_hard(temperature):
    source, prototypes = torch.randn(5, 3), torch.randn(5, 7)
    got = protoclip.soft_targets(source, prototypes, temperature)
    assert torch.equal(got, prototypes) and got.data_ptr() != prototypes.data_ptr()


def test_a_tiny_temperature_tends_to_hard():
    source = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    prototypes = torch.randn(6, 4)
    torch.testing.assert_close(protoclip.soft_targets(source, prototypes, 1e-4), prototypes)


def test_one_and_no_cluster():
    one = torch.randn(1, 4)
    torch.testing.assert_close(protoclip.soft_targets(torch.randn(1, 9), one, 0.01), one)
    assert protoclip.soft_targets(torch.randn(0, 9), torch.randn(0, 4), 0.01).shape == (0, 4)


def test_result_is_a_constant():
    source = torch.randn(5, 3, requires_grad=True)
    assert not protoclip.soft_targets(source, source, 0.1).requires_grad


def test_a_temperature_that_is_no_number_is_refused():
    c = torch.randn(3, 4)
    for temperature in (torch.tensor(0.1), "0.1"):
        with pytest.raises(
            TypeError, match="soft_targets: expected temperature as a Python number"
        ):
            protoclip.soft_targets(c, c, temperature)
