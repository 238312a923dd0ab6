"""Run by torchrun: `tools/scale/ddp.py` as often as there are ways to call it, in the same two processes."""

import runpy
import sys

_, script, ways, *arguments = sys.argv
for way in ways.split(","):
    sys.argv = [script, *arguments, *filter(None, [way])]
    runpy.run_path(script, run_name="__main__")
