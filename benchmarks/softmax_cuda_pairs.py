"""Causal bf16 softmax forward: the Hopper kernel against torch SDPA (cuDNN), interleaved pairs.

usage: softmax_cuda_pairs.py LIBRARY [HEAD_DIM:TOKENS ...]
"""
import ctypes
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS = 32, 8
DEFAULT = [f"{dim}:{tokens}" for dim in (128, 64) for tokens in (8192, 16384, 32768, 65536, 131072)]

lib = ctypes.CDLL(sys.argv[1])
lib.softmax_bench_open.restype = ctypes.c_void_p
lib.softmax_bench_open.argtypes = [ctypes.c_int64] + [ctypes.c_int] * 4
lib.softmax_bench_launch.argtypes = [ctypes.c_void_p] * 7
lib.softmax_bench_close.argtypes = [ctypes.c_void_p]


def milliseconds(call):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def pair(dim, tokens):
    q = torch.randn(1, tokens, HEADS, dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, tokens, KV_HEADS, dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    out = torch.full_like(q, float("nan"))
    lse = torch.empty(HEADS, tokens, device="cuda", dtype=torch.float32)
    # The peer gets its own preferred [heads, tokens, dim] layout.
    tq, tk, tv = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    bench = lib.softmax_bench_open(tokens, HEADS, KV_HEADS, dim, 1)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def ours():
        status = lib.softmax_bench_launch(bench, q.data_ptr(), k.data_ptr(), v.data_ptr(),
                                          out.data_ptr(), lse.data_ptr(), stream)
        assert status == 0, status

    def theirs():
        return F.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for _ in range(2):
            ours()
            want = theirs()
        difference = ((out - want.transpose(1, 2)).float().norm() / want.float().norm()).item()
        pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(5 if tokens > 65536 else 11)]
    lib.softmax_bench_close(bench)
    flop = 2.0 * tokens * tokens * dim * HEADS
    a = statistics.median(x for x, _ in pairs)
    b = statistics.median(y for _, y in pairs)
    row = dict(head_dim=dim, tokens=tokens, ours=round(flop / a * 1e-9, 1),
               cudnn=round(flop / b * 1e-9, 1),
               ratio=round(statistics.median(y / x for x, y in pairs), 4),
               ours_ms=a, cudnn_ms=b, difference=difference)
    print(json.dumps(row), flush=True)


print(json.dumps(dict(gpu=torch.cuda.get_device_name(0), torch=torch.__version__,
                      cudnn=torch.backends.cudnn.version())), flush=True)
for item in sys.argv[2:] or DEFAULT:
    pair(*(int(x) for x in item.split(":")))
