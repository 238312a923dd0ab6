"""`python -m minipeft.course.claims`: see the package."""

import argparse
import json

import torch

from minipeft.course.claims import PATH, recompute, table
from minipeft.whole import write_whole

parser = argparse.ArgumentParser(description="Recomputes the claims ledger and prints it.")
parser.add_argument("--quick", action="store_true", help="keep the stored figures of the measured rows")
parser.add_argument("--write", action="store_true", help="store what came out")
options = parser.parse_args()
torch.set_num_threads(1)
rows = recompute(options.quick)
print(table(rows))
if options.write:
    write_whole(PATH, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
