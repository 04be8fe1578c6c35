"""Towers and heads as a training step runs them: compiled if asked for, and on a GPU with TF32 and
with batches that are copied while it works.

TF32 rounds the factors of fp32 products to ten bits of mantissa. The towers may have it while they
train; losses, prototypes and metrics may not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from protoclip.data import Batch
from protoclip.model import Encoded, ProtoModel


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Allow TF32 in products and convolutions on a GPU, or forbid it; then put back what was."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _allow_tf32(allowed, allowed)
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(in_products: bool, in_convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = in_products
    torch.backends.cudnn.allow_tf32 = in_convolutions


class Towers:
    """A model's towers and heads.

    Args:
        compiled: whether ``torch.compile`` makes them, each for every shape that it meets.
        tf32: whether the towers may use TF32, forward and backward.
    """

    def __init__(self, model: ProtoModel, *, compiled: bool, tf32: bool) -> None:
        self.tf32 = tf32
        self._encode_image = model.clip.encode_image
        self._encode_text = model.encode_text
        self.project = model.project
        if compiled:
            self._encode_image = torch.compile(self._encode_image, dynamic=False)
            self._encode_text = torch.compile(self._encode_text, dynamic=False)
            self.project = torch.compile(self.project, dynamic=False)

    def encode(self, image: Tensor, tokens: Tensor) -> Encoded:
        """As ``ProtoModel.encode``. ``backward`` goes through the result."""
        with self._exactly_unless(self.tf32):
            encoded = Encoded(self._encode_image(image), self._encode_text(tokens))
        if self.tf32:
            # Autograd takes the newest operation first: the losses' all come before the towers'.
            for features in (encoded.image, encoded.text):
                if features.requires_grad:
                    features.register_hook(lambda _: _allow_tf32(True, True))
        return encoded

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss of encoded features."""
        with self._exactly_unless(False):
            loss.backward()

    def _exactly_unless(self, tf32: bool) -> contextlib.AbstractContextManager:
        return tf32_products(tf32) if self.tf32 else contextlib.nullcontext()


class Copies:
    """Brings batches to a device; to a GPU while it still works on the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of(self, batch: Batch) -> Batch:
        """The batch on the device."""
        if self._stream is None:
            return batch.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            copied = batch.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in copied.tensors:
            tensor.record_stream(computing)  # or the next copy could get its memory too early
        return copied
