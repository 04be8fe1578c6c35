"""Steps whose loss or gradient is not finite: skipped, counted, and explained when they go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protoclip.data import Batch
from protoclip.distributed import is_distributed

LATE = 4  # steps that may pass before a verdict is waited for
NAMED = 8  # sample keys in the message; all of them stand in out.log


class Guard:
    """Counts bad steps without waiting for the device, and undoes what they left in buffers.

    The optimiser skips a bad step by itself (``Optimiser.step``); running statistics are put back
    here. On a GPU the verdict of a step is read a step or more later, when it has arrived.

    Args:
        model: whose running statistics are protected.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        self._before: list[Tensor] = []
        self._device = device
        self._pending: deque[tuple[int, Sequence[Batch], Tensor, Any]] = deque()
        self.total = 0
        self.in_a_row = 0

    def before(self) -> None:
        """Remember the running statistics: call ahead of the forward pass."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def after(
        self, step: int, parts: Sequence[Batch], finite: Tensor
    ) -> Iterator[tuple[int, Sequence[Batch]]]:
        """Put the statistics back if the step was bad; yields the bad steps that are known by now.

        Args:
            step: number of the step.
            parts: the batches it was taken on.
            finite: bool scalar on the device, from ``Optimiser.step``.
        """
        for buffer, old in zip(self._buffers, self._before, strict=True):
            torch.where(finite, buffer, old, out=buffer)
        self._before = []
        if self._device.type == "cuda":
            verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
            verdict.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            verdict, event = finite, None
        self._pending.append((step, parts, verdict, event))
        return self._judged(wait=len(self._pending) > LATE)

    def undo(self) -> None:
        """Put the statistics back."""
        for buffer, old in zip(self._buffers, self._before, strict=True):
            buffer.copy_(old)
        self._before = []

    def finish(self) -> Iterator[tuple[int, Sequence[Batch]]]:
        """The bad steps not told yet; waits for the device."""
        return self._judged(wait=True)

    def _judged(self, wait: bool) -> Iterator[tuple[int, Sequence[Batch]]]:
        while self._pending:
            step, parts, verdict, event = self._pending[0]
            if event is not None:
                # Ranks must learn of a step at the same one, whatever their clocks.
                if not wait and (is_distributed() or not event.query()):
                    return
                event.synchronize()
            self._pending.popleft()
            if verdict:
                self.in_a_row = 0
            else:
                self.total += 1
                self.in_a_row += 1
                yield step, parts

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def first_not_finite(
    model: nn.Module, batch: Batch, losses: Callable[[Batch], dict[str, Tensor]]
) -> str:
    """Name the first tensor that goes bad when a batch is done again.

    Args:
        model: hooks are put on its modules for the time of the call.
        batch: on the model's device.
        losses: makes the named loss terms of the batch by way of ``model``; the last is the total.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    if not batch.image.isfinite().all():
        return "the pictures of the batch"
    found: list[str] = []

    def hook(name: str) -> Callable:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            bad = any(not t.isfinite().all() for t in _tensors(output))
            if bad and not found:
                found.append(f"the output of {name or 'the model'}")

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        terms = losses(batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, term in terms.items():
        if not term.isfinite().all():
            return f"the loss {name}"
    return _bad_gradient(model, list(terms.values())[-1])


def _bad_gradient(model: nn.Module, total: Tensor) -> str:
    """The backward pass goes from the last layer to the first: the last bad one was the first."""
    names, parameters = zip(
        *[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True
    )
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    bad = [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    return f"the gradient of {bad[-1]}" if bad else "nothing, when it was done again"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(vars(value))


def describe(keys: Sequence[str]) -> str:
    """Some sample keys, for a message."""
    named = ", ".join(map(repr, keys[:NAMED]))
    return named if len(keys) <= NAMED else f"{named} and {len(keys) - NAMED} more"
