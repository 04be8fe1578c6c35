"""One step's loss, gradients and update: DDP over the ranks, several forward passes a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.data import Batch
from protoclip.distributed import is_distributed
from protoclip.losses import Losses, ProtoLoss
from protoclip.model import Encoded, ProtoModel
from protoclip.prototypes import Episode
from protoclip.training.engine import Optimiser
from protoclip.training.phases import Phases


class Stepper:
    """Takes gradient steps that depend on the global batch alone.

    With several batches a step, the towers encode each without gradients, heads and losses see all
    of them at once, and each is encoded again for its share of the gradient (GradCache, Gao et al.
    2021; OpenCLIP's --accum-freq forms the loss once for every batch instead). Dropout repeats its
    masks; batch norm inside a tower sees one batch at a time.

    Args:
        model: on ``device``.
        loss: of this rank's share of the global batch.
        optimiser: of the model's parameters.
        autocast: makes the context of a forward pass.
        phases: the stopwatch.
    """

    def __init__(
        self,
        model: ProtoModel,
        loss: ProtoLoss,
        optimiser: Optimiser,
        autocast: Callable[[], AbstractContextManager],
        phases: Phases,
        device: torch.device,
    ) -> None:
        self.model, self.loss, self.optimiser = model, loss, optimiser
        self.autocast, self.phases, self.device = autocast, phases, device
        self._replica: nn.Module = model
        self._trained: list[nn.Parameter] = []
        self._unused: dict[frozenset[str], list[nn.Parameter]] = {}

    def step(
        self, batches: Sequence[Batch], episode: Episode | None, project: bool
    ) -> tuple[Losses, Encoded | None, Tensor, Tensor]:
        """One update from this rank's batches.

        Args:
            batches: of one size, on the host.
            episode: prototypes, or None.
            project: whether the heads run.
        Returns:
            The losses, the projections [B, Dh] of all batches, the gradient's norm, and whether the
            step was taken.
        """
        self.optimiser.zero_grad()  # before the forward pass needs the memory
        moved = [batch.to(self.device, non_blocking=True) for batch in batches]
        self._replicate(moved[0])
        if len(moved) > 1:
            return self._cached(moved, episode, project)
        with self.phases.measure("forward"):
            projected, losses = self.forward(moved[0], episode, project)
        with self.phases.measure("backward"):
            unused = self._without_gradient(losses)
            self.optimiser.scaled(losses.total + _zero(unused)).backward()
            norm, finite = self.optimiser.update(losses.total, unused)
        return losses, projected, norm, finite

    def forward(
        self, batch: Batch, episode: Episode | None, project: bool
    ) -> tuple[Encoded | None, Losses]:
        """Projections and losses of one batch on the device."""
        with self.autocast():
            encoded, projected = self._replica(batch.image, batch.tokens, project=project)
        return projected, self._losses(encoded, projected, batch.index, episode)

    def _losses(
        self, encoded: Encoded, projected: Encoded | None, index: Tensor, episode: Episode | None
    ) -> Losses:
        scales = self.model.logit_scale, self.model.proto_scale
        return self.loss(encoded, projected, index, *scales, episode, self.phases.measure)

    def _cached(
        self, batches: Sequence[Batch], episode: Episode | None, project: bool
    ) -> tuple[Losses, Encoded | None, Tensor, Tensor]:
        with self.phases.measure("forward"):
            states, parts = [], []
            for batch in batches:
                states.append(_random_state(self.device))
                with torch.no_grad(), self.autocast():
                    parts.append(self.model.encode(batch.image, batch.tokens))
            after = _random_state(self.device)
            encoded = Encoded(
                torch.cat([part.image for part in parts]).requires_grad_(),
                torch.cat([part.text for part in parts]).requires_grad_(),
            )
            with self.autocast():
                projected = self.model.project(encoded) if project else None
            index = torch.cat([batch.index for batch in batches])
            losses = self._losses(encoded, projected, index, episode)
        with self.phases.measure("backward"):
            unused = self._without_gradient(losses, *self._tower_parameters())
            # Outside of a forward pass of DDP: heads and scales keep their own rank's sums.
            self.optimiser.scaled(losses.total).backward()
            size = len(batches[0].index)
            grads = [
                torch.zeros_like(u) if u.grad is None else u.grad
                for u in (encoded.image, encoded.text)
            ]
            for number, batch in enumerate(batches):
                own = slice(number * size, number * size + len(batch.index))
                _set_random_state(states[number], self.device)
                self._tower_gradients(batch, [g[own] for g in grads], number + 1 == len(batches))
            _set_random_state(after, self.device)
            norm, finite = self.optimiser.update(losses.total, unused)
        return losses, projected, norm, finite

    def _tower_gradients(self, batch: Batch, grads: Sequence[Tensor], last: bool) -> None:
        """Encode again and pass the gradients [B, D] down; with the last batch, to all ranks."""
        with self._no_sync(not last):
            with self.autocast():
                encoded, _ = self._replica(batch.image, batch.tokens, project=False)
            roots = [encoded.image, encoded.text]
            pairs = [(u, g) for u, g in zip(roots, grads, strict=True) if u.requires_grad]
            if last and is_distributed():
                known = _reached(roots)
                zero = _zero([p for p in self._trained if id(p) not in known])
                if isinstance(zero, Tensor):
                    pairs.append((zero, torch.ones_like(zero)))
            torch.autograd.backward([u for u, _ in pairs], [g for _, g in pairs])

    def _tower_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.clip.parameters() if p is not self.model.clip.logit_scale)

    def _no_sync(self, wanted: bool) -> AbstractContextManager:
        if wanted and isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def _replicate(self, batch: Batch) -> None:
        """Wrap the model anew where it trains other parameters than before."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        same = len(trained) == len(self._trained) and all(
            a is b for a, b in zip(trained, self._trained, strict=True)
        )
        if not is_distributed() or same:
            return
        self._trained, self._unused = trained, {}
        devices = [self.device] if self.device.type == "cuda" else None
        self._replica = DistributedDataParallel(
            self.model, device_ids=devices, gradient_as_bucket_view=True
        )
        self._settle(batch)

    def _settle(self, batch: Batch) -> None:
        """Let DDP order its buckets, which it does once, by an idle pass that is the same whenever
        it comes: so a resumed run sums in the order of the run it resumes."""
        states = _random_state(self.device), [b.clone() for b in self.model.buffers()]
        with self.autocast():
            encoded, _ = self._replica(batch.image, batch.tokens, project=False)
        known = _reached([encoded.image, encoded.text])
        rest = _zero([p for p in self._trained if id(p) not in known])
        (encoded.image.sum() + encoded.text.sum() + rest).backward()
        self.optimiser.zero_grad()
        _set_random_state(states[0], self.device)
        for buffer, before in zip(self.model.buffers(), states[1], strict=True):
            buffer.copy_(before)

    def _without_gradient(self, losses: Losses, *reached: nn.Parameter) -> list[nn.Parameter]:
        """Parameters that this loss does not reach: DDP waits for all, the optimiser must not move
        them. The walk over the graph is done once for each set of terms."""
        if not is_distributed():
            return []
        terms = frozenset(losses.terms)
        if terms not in self._unused:
            known = _reached([losses.total]) | {id(p) for p in reached}
            self._unused[terms] = [p for p in self._trained if id(p) not in known]
        return self._unused[terms]


def _reached(roots: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that a backward pass from ``roots`` gives a gradient."""
    seen, leaves = set(), set()
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions if following is not None]
    return leaves


def _zero(parameters: Sequence[nn.Parameter]) -> Tensor | float:
    """0, with a gradient of 0 for each parameter."""
    return sum((0.0 * p.sum() for p in parameters), 0.0)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
