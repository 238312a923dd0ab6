"""Run by torchrun: the training of `tools/scale/ddp.py` in each of its ways, in the same two processes."""

import json
import runpy
import sys

import torch.distributed as dist

script, steps, batch, lr = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
train = runpy.run_path(script)["train"]
dist.init_process_group("gloo")
for shard, accelerate in ((False, False), (True, False), (False, True)):
    losses = train(steps, batch, lr, None, shard, accelerate)
    if dist.get_rank() == 0:
        print(json.dumps({"processes": dist.get_world_size(), "losses": losses}), flush=True)
dist.destroy_process_group()
