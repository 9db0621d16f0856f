"""A nonlinear PDE whose grid lies in strips on several processes, solved as by one.

    torchrun --nproc-per-node 3 docs/examples/sharded_pde.py
    torchrun --nproc-per-node 2 docs/examples/sharded_pde.py --nodes 96

Bratu's problem, −Δu = λ e^u on the unit square, u = 0 around it, for four λ at once. Each process holds a strip of rows
of every sample and exchanges one row with each neighbour per evaluation; the solver adds up a few numbers per sample
and step, whatever the grid is. On a GPU each process takes one and they talk through nccl, else through gloo. Rank 0
prints evaluations and gradients beside those of one process.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from pydeqsolve import Anderson, Stop, solve


class Halo(torch.autograd.Function):
    """Rows u (B, rows, n) of a strip → (B, rows + 2, n), with the rows next to it; zeros outside the square.

    The gradient goes back to the strips that the rows came from.
    """

    @staticmethod
    def forward(ctx, u, group):
        ctx.group = group
        above, below = exchanged(u[:, 0], u[:, -1], group)
        return torch.cat([above[:, None], u, below[:, None]], 1)

    @staticmethod
    def backward(ctx, g):
        above, below = exchanged(g[:, 0], g[:, -1], ctx.group)
        inner = g[:, 1:-1].clone()
        inner[:, 0] += above
        inner[:, -1] += below
        return inner, None


def exchanged(up, down, group):
    """What the neighbour above has sent down and the one below has sent up, (B, n) each; zeros where there is none."""
    from_above, from_below = torch.zeros_like(up), torch.zeros_like(down)
    if group is None:
        return from_above, from_below
    rank, size, messages = dist.get_rank(group), dist.get_world_size(group), []
    for other, sent, got in ((rank - 1, up, from_above), (rank + 1, down, from_below)):
        if 0 <= other < size:
            messages.append(dist.P2POp(dist.isend, sent.contiguous(), group=group, group_peer=other))
            messages.append(dist.P2POp(dist.irecv, got, group=group, group_peer=other))
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
    return from_above, from_below


def solved(strength, rows, nodes, group):
    """u (B, rows, nodes) for λ = strength (B,) on this process's rows; group None: it has them all."""

    def jacobi(u, strength):
        beside = torch.nn.functional.pad(u, (1, 1))
        around = Halo.apply(u, group)
        neighbours = around[:, :-2] + around[:, 2:] + beside[..., :-2] + beside[..., 2:]
        return (neighbours + strength[:, None, None] * u.exp() / (nodes + 1) ** 2) / 4

    start = torch.zeros(len(strength), rows, nodes, dtype=strength.dtype, device=strength.device)
    return solve(jacobi, start, (strength,), solver=Anderson(10), stop=Stop(1e-6, max_steps=2000), group=group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=48, help="of the grid, in each direction")
    nodes = parser.parse_args().nodes

    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() > local
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # A process that dies or stays silent for longer than this is an error on all others.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    rows = nodes * (rank + 1) // size - nodes * rank // size
    strength = torch.tensor([0.5, 2.0, 4.0, 6.0], dtype=torch.float64, device=device, requires_grad=True)
    out = solved(strength, rows, nodes, group)
    mean = out.z.sum((1, 2)) / nodes**2  # of these rows; the losses of all ranks add up
    (gradient,) = torch.autograd.grad(mean.sum(), strength)
    dist.all_reduce(gradient)  # each rank has the share that its rows make
    print(f"rank {rank} of {size}: {rows} rows, {out.evaluations.tolist()} evaluations", flush=True)

    if rank == 0:
        alone = solved(strength, nodes, nodes, None)
        (expected,) = torch.autograd.grad(alone.z.sum() / nodes**2, strength)
        print(f"one process: {alone.evaluations.tolist()} evaluations")
        error = (out.z - alone.z[:, :rows]).abs().max() / alone.z.abs().max()
        off = (gradient - expected).abs().max()
        print(f"the solution differs by {error:.0e}, its gradient in λ by {off:.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
