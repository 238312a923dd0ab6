"""LoRA under DistributedDataParallel: each process has the whole frozen base and a share of every batch.

    python tools/scale/ddp.py                                             one process
    torchrun --standalone --nproc_per_node 2 tools/scale/ddp.py           two, with the same losses
    torchrun --standalone --nproc_per_node 2 tools/scale/ddp.py --shard   two, each with a share of the weights as well
    torchrun --standalone --nproc_per_node 2 tools/scale/ddp.py --accelerate     two, wrapped by accelerate

Only the adapter's gradients travel: 4 bytes a trained number and step, where full fine-tuning sends the whole model's.
With `--shard` (FSDP2) the base does not have to fit into one process: a block's weights are put together when it runs.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import minipeft as mp
from minipeft.learn.fit import groups


def train(steps: int, batch: int, lr: float, save: str | None, shard: bool, accelerate: bool) -> list[float]:
    """The loss of each step over the whole batch, the same in every process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    model, _ = mp.load("pocket")
    tuned = mp.attach(model.to(device), mp.LoRA(rank=8))
    if shard:
        for block in model.model.layers:
            fully_shard(block, mesh=init_device_mesh(device.type, (world,)))
        parallel = fully_shard(tuned, mesh=init_device_mesh(device.type, (world,)))
    elif accelerate:
        parallel = Accelerator(cpu=device.type == "cpu").prepare(tuned)
    else:
        parallel = DistributedDataParallel(tuned)
    optimizer = torch.optim.AdamW(groups(tuned, lr), lr=lr, weight_decay=0.0)
    losses = []
    tuned.train()
    for inputs in mp.batches(tuned, mp.world.pirate(), n=steps, size=batch):
        mine = {name: value[rank::world] for name, value in inputs.items()}
        # DDP takes the mean over the processes, the loss is a mean over tokens: each process counts by its tokens
        share = (mine["labels"][:, 1:] != -100).sum() / (inputs["labels"][:, 1:] != -100).sum()
        loss = parallel(**mine).loss * share
        optimizer.zero_grad()
        (loss * world).backward()
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
    if rank == 0 and save:
        tuned.save(save)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", help="a folder for the adapter")
    parser.add_argument("--shard", action="store_true", help="split the weights over the processes, too")
    parser.add_argument("--accelerate", action="store_true", help="let accelerate wrap the model")
    options = parser.parse_args()
    if options.accelerate and options.shard:
        parser.error("--shard and --accelerate are two ways; choose one")
    if options.save and options.shard:
        parser.error("with --shard no process has the whole adapter, so it cannot be saved from here")
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        losses = train(options.steps, options.batch, options.lr, options.save, options.shard, options.accelerate)
        if dist.get_rank() == 0:
            print(json.dumps({"processes": dist.get_world_size(), "losses": losses}))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
