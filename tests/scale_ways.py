"""Run by torchrun: `tools/scale/ddp.py` as often as there are ways to call it, in the same two processes."""

import runpy
import sys

import torch.distributed as dist

_, script, ways, *options = sys.argv
dist.init_process_group("gloo")
leave = dist.destroy_process_group
dist.init_process_group = dist.destroy_process_group = lambda *_: None  # a second group in one process may never form
for way in ways.split(","):
    sys.argv = [script, *options, *filter(None, [way])]
    runpy.run_path(script, run_name="__main__")
leave()
