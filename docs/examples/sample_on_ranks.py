"""One image sampled by several processes: each evaluates its share of the time steps of every round.

    torchrun --nproc-per-node 2 docs/examples/sample_on_ranks.py
    torchrun --nproc-per-node 8 docs/examples/sample_on_ranks.py --steps 1000     # 8 GPUs, if the machine has them

On a GPU each process takes one and they talk through nccl, else through gloo. Every process passes the same latents and
gets the same image; rank 0 prints what it took, beside one process sampling step by step.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from diffusion import load_checkpoint, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", default="digits")
    arguments = parser.parse_args()

    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() > local
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    # A process that dies or stays silent for longer than this is an error on all others.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))

    checkpoint = load_checkpoint(arguments.model)
    model = checkpoint.model.to(device)
    chain = checkpoint.schedule.chain(arguments.steps)
    x_T = torch.randn(1, *checkpoint.shape, generator=torch.Generator().manual_seed(0)).to(device)

    rows = 0

    def count(module, inputs):
        nonlocal rows
        rows += len(inputs[0])

    handle = model.register_forward_pre_hook(count)
    with torch.no_grad():
        out = sample(model, x_T, chain, prediction=checkpoint.prediction, group=dist.group.WORLD)
    handle.remove()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {rows} model rows in {out.rounds} rounds", flush=True)

    if dist.get_rank() == 0:
        with torch.no_grad():
            x_0 = sample(model, x_T, chain, prediction=checkpoint.prediction, method="sequential").x_0
        error = ((out.x_0 - x_0).norm() / x_0.norm()).item()
        print(f"{int(out.evaluations)} rows in all, {error:.1e} from the {arguments.steps} steps one after the other")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
