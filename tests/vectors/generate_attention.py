"""Writes attention.safetensors, which tests/suite/attention reads, here.

Run it again with

    pip install torch numpy safetensors
    python tests/vectors/generate_attention.py

It needs no GPU and takes seconds. What is expected is PyTorch's own `scaled_dot_product_attention` in float64, with its grouped
heads and a mask, and its gradients by autograd; `lse` is its `logsumexp` of the scores. Inputs are drawn in float32. Cases are
stored as generate.py stores its own.
"""

import torch
import torch.nn.functional as F

from generate import Case, save

# name: batch, queries, keys, heads, kv_heads, d_head, scale, cu_seqlens, size of the inputs, and whether it is causal
CASES = {
    "one step": (1, 1, 1, 1, 1, 4, None, None, 1.0),
    "heads of their own": (2, 5, 5, 3, 3, 4, None, None, 1.0),
    "grouped": (1, 17, 17, 4, 2, 4, None, None, 1.0),
    "one head of keys": (1, 9, 9, 4, 1, 6, None, None, 1.0),
    "odd sizes": (1, 11, 11, 3, 1, 7, None, None, 1.0),
    "another scale": (1, 10, 10, 2, 1, 4, 0.3, None, 1.0),
    "beyond a block of keys": (1, 70, 70, 1, 1, 4, None, None, 1.0),
    "beyond a tile of rows": (1, 34, 34, 2, 1, 2, None, None, 1.0),
    "sharp": (1, 14, 14, 2, 2, 4, None, None, 6.0),
    "packed": (1, 30, 30, 2, 1, 4, None, [0, 7, 7, 8, 30], 1.0),
    "more keys than queries": (2, 5, 21, 4, 2, 4, None, None, 1.0),
    "one query": (3, 1, 13, 4, 2, 4, None, None, 1.0),
    "all keys": (2, 19, 19, 4, 2, 4, None, None, 1.0, False),
    "all keys, packed": (1, 30, 30, 2, 1, 4, 0.3, [0, 7, 7, 8, 30], 1.0, False),
    "all of fewer keys": (1, 20, 7, 2, 2, 4, None, None, 1.0, False),
    "all keys, beyond a block and a tile": (1, 36, 70, 2, 1, 4, None, None, 1.0, False),
}


def case(name, batch, queries, keys, heads, kv_heads, d_head, scale, cu_seqlens, size, causal=True):
    case = Case(name, scale=scale, cu_seqlens=cu_seqlens, causal=causal)
    q = case.normal("q", batch, queries, heads, d_head, deviation=size)
    k = case.normal("k", batch, keys, kv_heads, d_head, deviation=size)
    v = case.normal("v", batch, keys, kv_heads, d_head)
    # Query i of n sees the keys from 0 to m - n + i of its own sequence, or all of them.
    mask = torch.ones(queries, keys).bool()
    if causal:
        mask = mask.tril(keys - queries)
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(queries), torch.tensor(cu_seqlens[1:]), right=True)
        mask &= sequence[:, None] == sequence[None, :]
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*by_heads, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    wide = by_heads[1].repeat_interleave(heads // kv_heads, 1)
    scores = by_heads[0] @ wide.transpose(2, 3) * (scale if scale is not None else d_head**-0.5)
    lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1).transpose(1, 2)
    d_out = case.normal("d_out", *out.shape)
    gradients = torch.autograd.grad((out * d_out).sum(), (q, k, v))
    case.tensors |= {"out": out.detach(), "lse": lse.detach()}
    case.tensors |= {f"grad_{name}": gradient for name, gradient in zip("qkv", gradients)}
    return case


if __name__ == "__main__":
    torch.set_num_threads(1)
    save("attention", [case(name, *sizes) for name, sizes in CASES.items()])
