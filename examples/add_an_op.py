"""Add an op of your own to the table, from outside the package.

python examples/add_an_op.py

The op is softcap(x, cap) = cap * tanh(x / cap). It gets a reference, which is the truth; a backend;
a check of its arguments; cases, with which it is judged; and a cost, with which it is benchmarked.
"""

import torch
from torch import Tensor

from gemma4_fast import ops, use_backend
from gemma4_fast.ops.accuracy import Judge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softcap_reference(x: Tensor, cap: float) -> Tensor:
    """x [..., H] -> cap * tanh(x / cap), computed in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def softcap_torch(x: Tensor, cap: float) -> Tensor:
    """The same in fewer calls, for fp32 and half precision."""
    return torch.tanh(x.float() / cap).mul_(cap).to(x.dtype)


def check(x: Tensor, cap: float) -> None:
    if cap <= 0:
        raise ValueError(f"softcap: cap must be positive, got {cap}")


op = ops.register(
    ops.Op(
        name="softcap",
        summary="cap * tanh(x / cap)",
        reference=softcap_reference,
        check=check,
        cases={
            "one_token": lambda make: dict(x=make.randn(1, 2816), cap=30.0),
            "odd": lambda make: dict(x=make.randn(3, 97, scale=100.0), cap=30.0),
        },
        cost=lambda x, cap: ops.Cost(flops=3 * x.numel(), bytes=2 * x.nbytes),
        # "module:function" is imported at the first call. Kernels for "cpu", "triton" and "cuda"
        # are named in the same way.
        impls={"torch": ops.Impl(f"{__name__}:softcap_torch", dtypes=DTYPES)},
    )
)

# The table checks the arguments and chooses the backend. `use_backend` works as for other ops.
x = torch.randn(4, 8) * 100
backend, _ = ops.decide("softcap", x.device, x.dtype)
y = op(x, 30.0)
with use_backend("reference"):
    difference = (y - op(x, 30.0)).abs().max().item()
print(f"softcap runs on {backend}; largest difference from the reference: {difference:.1e}")

# The judge compares it with the reference in fp64. It may lose twice what plain PyTorch does.
for case in op.cases:
    for dtype in (torch.float32, torch.bfloat16):
        verdict = Judge(op, op.inputs(case, dtype))(op)
        print(f"{case} in {dtype}: {'right' if verdict.ok else 'WRONG: ' + verdict.message}")
