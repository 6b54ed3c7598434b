"""What kind of work a kernel does, by its name: one table for GPU kernels and for operators on a CPU.

The first rule that fits counts, so the order matters: flash attention is written in CUTLASS, as matrix products are; fused
optimizers are called multi_tensor_apply, as is clipping, which belongs to the update as well.
"""

import re
from typing import Literal, get_args

Category = Literal[
    "communication", "attention", "optimizer", "fp8 casts", "gemm", "norm", "memory", "elementwise", "other"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

RULES: tuple[tuple[Category, str], ...] = (
    ("communication", r"nccl|^c10d::|^gloo:|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|userbuffers|nvshmem"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention|varlen|fused_attn|dot_do_o"),
    ("optimizer", r"multi_tensor|_foreach_|fused_?adam|adamfunctor|adam_|lambfunctor|l2norm|clip_grad"),
    (
        "fp8 casts",
        r"cast_transpose|block_scaled|blockwise|quantize|amax|fp8|float8|mxfp8|compute_scale|transpose_kernel",
    ),
    (
        "gemm",
        r"gemm|nvjet|cutlass|cublas|xmma|wgmma|gemv|splitk|aten::(mm|bmm|addmm|addbmm|baddbmm|linear|matmul|_addmm_activation)$"
        r"|mkldnn_linear|mkl_linear|onednn|triton_\w*_mm|implicit_convolve|convolution|conv2d|\bconv",
    ),
    ("norm", r"layer_?norm|rms_?norm|ln_fwd|ln_bwd|rmsnorm|normalization|gammabeta"),
    (
        "memory",
        r"memcpy|memset|copy|fill|catarray|concat|index|gather|scatter|aten::(cat|clone|contiguous|zero_|zeros|empty\w*|stack"
        r"|split\w*|slice\w*|select|narrow|pad|constant_pad_nd|to|_to_copy|as_strided|view|reshape|transpose|permute)$|embedding",
    ),
    (
        "elementwise",
        r"elementwise|triton_|reduce_kernel|softmax|nll_loss|cross_entropy|swiglu|silu|gelu|rotary|rope|sort|scan|^aten::",
    ),
)
_COMPILED: tuple[tuple[Category, re.Pattern[str]], ...] = tuple(
    (category, re.compile(pattern, re.IGNORECASE)) for category, pattern in RULES
)


def category_of(name: str) -> Category:
    """The category of a kernel or operator."""
    for category, pattern in _COMPILED:
        if pattern.search(name):
            return category
    return "other"
