"""What DistributedDataParallel wraps, which changes when heads start or the image tower stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.distributed import is_distributed
from protoclip.losses.objective import Losses, OwnTerms
from protoclip.model import Encoded
from protoclip.training.run import Run
from protoclip.training.towers import Towers
from protoclip.training.update import Statistics, Update

Result = tuple[Losses, Encoded | None]


class Replicas:
    """Calls a function that uses the model; the backward pass of its losses averages the gradients
    of what trains over the ranks. In one process it only calls the function.
    """

    def __init__(
        self, run: Run, terms: OwnTerms, towers: Towers, update: Update, statistics: Statistics
    ) -> None:
        self.model = run.model
        self.terms = terms
        self.towers = towers
        self.update = update
        self.statistics = statistics
        # InfoNCE uses both towers in every step. A term may use its weights in some steps only.
        self.find_unused = run.config.loss.w_clip <= 0 or any(True for _ in terms.parameters())
        self._ddp: DistributedDataParallel | None = None
        self._trained = (False, False)  # heads, image tower locked

    def __call__(self, function: Callable[[], Result], *, heads: bool) -> Result:
        """The function's result, through DDP's forward, which arms its hooks. ``heads``: whether
        they train."""
        if not is_distributed():
            return function()
        trained = (heads, self.model.image_locked)
        if self._ddp is None or trained != self._trained:
            self._trained = trained
            self._ddp = DistributedDataParallel(
                Replica(self.model if heads else self.model.clip, self.terms),
                gradient_as_bucket_view=True,
                find_unused_parameters=self.find_unused,
            )
            self._ddp.broadcast_buffers = False
            # An extra pass, which changes nothing else: DDP orders its buckets once, after the
            # first backward pass, so a resumed run then sums in the same order as the original run.
            before = self.statistics.copy()
            losses, _ = self._ddp(function)
            self.towers.backward(losses.total)
            self.update.adamw.zero_grad(set_to_none=True)
            self.statistics.restore(before)
        return self._ddp(function)

    def finite(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to take a step, a bool scalar that is the same on all ranks: they share the
        gradient, with its ``norm``, but not the loss."""
        return norm.isfinite() if is_distributed() else norm.isfinite() & loss.detach().isfinite()

    def end(self) -> None:
        """Drop DDP, before its process group is destroyed. As the last owner of a gloo group, DDP
        would wait for gloo's threads while it holds Python's lock; a thread that needs the lock to
        free its last work would never end."""
        self._ddp = None


class Replica(nn.Module):
    """What DistributedDataParallel wraps: what is trained, and a forward that calls a function
    that uses it."""

    def __init__(self, model: nn.Module, terms: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.terms = terms

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call the function and return its result."""
        return function()
