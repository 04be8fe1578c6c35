"""Random crops are torchvision's RandomResizedCrop in less time."""

import torch
from PIL import Image
from torchvision import transforms

from protoclip.data.images import RandomCrop


def crops(size: tuple[int, int], smallest: float, count: int) -> torch.Tensor:
    """Left, top, width and height of this many crops, float64 [count, 4]."""
    torch.manual_seed(0)
    boxes = [RandomCrop(24, smallest).box(*size) for _ in range(count)]
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float64).T
    return torch.stack([left, top, right - left, bottom - top], dim=1)


def torchvision_crops(size: tuple[int, int], smallest: float, count: int) -> torch.Tensor:
    torch.manual_seed(1)
    picture = Image.new("RGB", size)
    draw = transforms.RandomResizedCrop.get_params
    boxes = [draw(picture, [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, height, width = torch.tensor(boxes, dtype=torch.float64).T
    return torch.stack([left, top, width, height], dim=1)


def test_crops_are_distributed_as_torchvisions():
    for size, smallest in (((200, 150), 0.5), ((300, 300), 0.9)):
        ours = crops(size, smallest, 3000)
        theirs = torchvision_crops(size, smallest, 3000)
        error = (ours.var(0) / 3000 + theirs.var(0) / 3000).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
        ratio = ours.std(0) / theirs.std(0)
        assert ((ratio - 1).abs() < 0.1).all()


def test_crops_lie_within_the_picture_and_reach_its_edges():
    left, top, width, height = crops((60, 40), 0.5, 2000).T
    assert left.min() == 0 and top.min() == 0
    assert (left + width).max() == 60 and (top + height).max() == 40
    assert (width * height).min() > 0.45 * 60 * 40  # sides are whole pixels


def test_a_long_picture_gives_its_middle_as_torchvision_does():
    for size in ((1000, 100), (100, 1000), (1, 50)):
        assert torch.equal(crops(size, 0.9, 1), torchvision_crops(size, 0.9, 1))


def test_the_result_is_a_square_of_the_size_asked_for():
    assert RandomCrop(24, 0.9)(Image.new("RGB", (50, 31))).size == (24, 24)
