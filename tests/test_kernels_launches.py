"""How often the Triton InfoNCE launches: below a few thousand pairs that is what it costs."""

import sys

import pytest
import torch
from budget import assert_within_budget
from test_kernels_info_nce import DEVICE, DTYPES, _features
from test_kernels_info_nce import pytestmark as needs_triton
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import protoclip

pytestmark = needs_triton
ROOM = ("empty", "empty_strided", "new_empty", "empty_like", "promote_types")  # no launch
FORWARD = ["forward_kernel", "merge_kernel"]
BACKWARD = ["gradient_kernel", "addmm", "addmm", "finish_kernel"]


class Launches(TorchDispatchMode):
    """Names of what reaches the device, in order: Triton kernels, and torch's ops but for those
    that only look at a tensor or make room for one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from protoclip.kernels.info_nce_forward import forward_kernel

        launch = type(forward_kernel).run

        def run(kernel, *args, **kwargs):
            self.names.append(kernel.__name__)
            with _disable_current_modes():  # the interpreter itself computes with torch
                return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(type(forward_kernel), "run", run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "protoclip":
            body = f"_{name.removeprefix('contrastive_')}"
            with self:  # look into the op
                return getattr(sys.modules["protoclip.ops.contrastive"], body)(*args)
        # Without a card there is no product of half precision into fp32: the operands are widened.
        widened = name == "_to_copy" and DEVICE == "cpu"
        if not (func.is_view or name in ROOM or widened):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _count(monkeypatch, loss, leaves, upstream):
    with Launches(monkeypatch) as forward:
        value = loss(*leaves)
    count = len(forward.names)
    with forward:
        grads = torch.autograd.grad(value, leaves, upstream)
    return forward.names[:count], forward.names[count:], value, grads


def _leaves(n, d, dtype):
    scale = torch.tensor(20.0, device=DEVICE)
    return [t.requires_grad_() for t in (*_features(n, d, "alike", dtype), scale)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_six_launches(monkeypatch, dtype):
    """Of OpenCLIP's loss at a small batch, forward and backward."""
    monkeypatch.setenv("PROTOCLIP_BACKEND", "triton")
    leaves = _leaves(252, 64, dtype)
    one = torch.ones((), device=DEVICE)
    forward, backward, value, grads = _count(monkeypatch, protoclip.ClipLoss(), leaves, one)
    assert forward == FORWARD and backward == BACKWARD
    assert len(forward + backward) == 6
    plain = protoclip.info_nce(*leaves, reduction="none", backend="triton").sum() / 252
    for got, want in zip(
        (value, *grads), (plain, *torch.autograd.grad(plain, leaves)), strict=True
    ):
        assert_within_budget(got, want.double(), want, magnitude=2 * want.abs().max().item())


@pytest.mark.parametrize(
    "options, dtype, more",
    [
        ({"reduction": "sum"}, torch.float32, []),
        ({"reduction": "none"}, torch.bfloat16, []),
        # One weight for each pair in fp16: the largest of them, rows' and columns'.
        ({"reduction": "none"}, torch.float16, ["linalg_vector_norm"] * 2),
        ({"stash": True}, torch.bfloat16, []),
    ],
    ids=str,
)
def test_other_calls(monkeypatch, options, dtype, more):
    leaves = _leaves(70, 16, dtype)
    value = protoclip.info_nce(*leaves, backend="triton", **options)

    def loss(*leaves):
        return protoclip.info_nce(*leaves, backend="triton", **options)

    upstream = torch.rand(value.shape, device=DEVICE)
    forward, backward, *_ = _count(monkeypatch, loss, leaves, upstream)
    assert forward == FORWARD and backward == more + BACKWARD


def test_larger_batches(monkeypatch):
    """Many programs merge, and their losses are summed; chunks of G are summed up."""
    from protoclip.kernels import info_nce_forward, waves

    monkeypatch.setattr(info_nce_forward, "ONE_PROGRAM", 64)
    monkeypatch.setattr(waves, "SCRATCH_BYTES", 64 * 128 * 2)
    leaves = _leaves(100, 16, torch.bfloat16)

    def loss(*leaves):
        return protoclip.info_nce(*leaves, backend="triton")

    one = torch.ones((), device=DEVICE)
    forward, backward, *_ = _count(monkeypatch, loss, leaves, one)
    chunk = ["gradient_kernel", "lost_kernel", "addmm", "addmm", "finish_kernel"]
    assert forward == [*FORWARD, "sum"] and backward == 2 * chunk
