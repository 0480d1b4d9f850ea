"""One of several processes that sum a tensor together: ``python -m limbeck._doctor_reduce STORE RANK SIZE BACKEND``, for ``limbeck doctor``.

Prints the bytes a second of the best of five sums of 16 MB, counted as the tensor's size over the time.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]


def main(store: str, rank: int, size: int, backend: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, store=FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=30))
    values = torch.full((1 << 22,), float(rank), device=device)
    best = float("inf")
    for number in range(6):
        values.fill_(float(rank))
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if backend == "nccl":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    if not bool((values == size * (size - 1) / 2).all()):
        raise SystemExit("the sum is wrong")
    dist.destroy_process_group()
    if rank == 0:
        print(values.numel() * values.element_size() / best)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
