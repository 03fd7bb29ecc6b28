"""Causal zigzag ring attention out of PyTorch's own parts, the peer of ring_device_perf: cuDNN's forward with
log-sum-exp, NCCL send and receive beside it, a compiled merge in fp32. bf16, heads of 128.

usage: torchrun --nproc-per-node GPUS ring_torch.py TOKENS[:HEADS] ...   (32 heads; a key/value head for 4)
"""
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

DIM, GROUP, LONG = 128, 4, 262144
WARM_UP = 1.2  # seconds: clocks follow the power of about the last one
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank)


def attend(q, k, v, causal):
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return out, lse.float().reshape(q.shape[0], q.shape[1], q.shape[2], 1)


@torch.compile(dynamic=True)
def merge(out, lse, part, part_lse):
    both = torch.logaddexp(lse, part_lse)
    return out * torch.exp(lse - both) + part.float() * torch.exp(part_lse - both), both


def send_on(block):
    landing = [torch.empty_like(x) for x in block]
    transfers = []
    for mine, theirs in zip(block, landing):
        transfers += [dist.P2POp(dist.isend, mine, (rank + 1) % ranks),
                      dist.P2POp(dist.irecv, theirs, (rank - 1) % ranks)]
    return landing, dist.batch_isend_irecv(transfers)


def ring(q, k, v):
    """Rank r holds chunks r and 2N-1-r of 2N: keys of lower ranks are seen by half, all of them; those of
    higher ranks by the upper half of the rows."""
    block, half = [k, v], q.shape[2] // 2
    for step in range(ranks):
        if step < ranks - 1:
            landing, pending = send_on(block)
        owner = (rank - step) % ranks
        if step == 0:
            out, lse = attend(q, *block, True)
            out = out.float()
        elif owner < rank:
            out, lse = merge(out, lse, *attend(q, *(x[:, :, :half].contiguous() for x in block), False))
        else:
            upper = merge(out[:, :, half:], lse[:, :, half:], *attend(q[:, :, half:].contiguous(), *block, False))
            out[:, :, half:], lse[:, :, half:] = upper
        if step < ranks - 1:
            for transfer in pending:
                transfer.wait()
            block = landing
    return out.to(q.dtype)


def timed(call):
    dist.barrier()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def slowest(value):
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def seconds(call, warm_up, count):
    timed(call)  # compiles and connects
    spent = 0
    while spent < warm_up:
        spent += slowest(timed(call))
    return slowest(statistics.median([timed(call) for _ in range(count)]))


def say(**row):
    if rank == 0:
        print(json.dumps(row), flush=True)


def check():
    tokens, heads = 8192, 8
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, DIM, device=device, dtype=torch.bfloat16) for h in (heads, 2, 2))
    for x in (q, k, v):
        dist.broadcast(x, 0)
    chunk = tokens // (2 * ranks)

    def mine(x):
        upper = 2 * ranks - 1 - rank
        return torch.cat([x[:, :, c * chunk:(c + 1) * chunk] for c in (rank, upper)], 2).contiguous()

    want = F.scaled_dot_product_attention(q.float(), *(x.float().repeat_interleave(GROUP, 1) for x in (k, v)),
                                          is_causal=True)
    got = ring(mine(q), mine(k), mine(v)).float()
    error = ((got - mine(want)).norm() / mine(want).norm()).item()
    say(what="torch ring, check", error=error)
    assert error < 1e-2


def measure(tokens, heads):
    n = tokens // ranks
    q, k, v = (torch.randn(1, h, n, DIM, device=device, dtype=torch.bfloat16)
               for h in (heads, heads // GROUP, heads // GROUP))
    t = seconds(lambda: ring(q, k, v), WARM_UP, 5 if tokens <= LONG else 1)
    say(what="torch ring", gpus=ranks, heads=heads, tokens=tokens, ms=round(t * 1e3, 3),
        tflops_a_gpu=round(2 * tokens * tokens * DIM * heads / t / ranks * 1e-12, 1),
        gib=round(torch.cuda.max_memory_allocated() / 2**30, 2))
    torch.cuda.reset_peak_memory_stats()


torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=device)
check()
for item in sys.argv[1:]:
    parts = item.split(":")
    measure(int(parts[0]), int(parts[1]) if len(parts) > 1 else 32)
dist.destroy_process_group()
