"""LoRA under transformers.Trainer, which uses DistributedDataParallel by itself where torchrun starts more processes.

    python tools/scale/trainer.py                                         one process
    torchrun --standalone --nproc_per_node 2 tools/scale/trainer.py       two, with the same losses

The `Trainer` asks the model to divide by the tokens of the whole batch, so no share has to be weighted here.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import minipeft as mp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", help="a folder for the adapter")
    options, processes = parser.parse_args(), int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch % processes:
        parser.error(f"--batch {options.batch} cannot be divided among {processes} processes")
    model, tokenizer = mp.load("pocket")
    tuned = mp.attach(model, mp.LoRA(rank=8))
    rows = [
        {name: value[0] for name, value in one.items()}
        for one in mp.batches(tuned, mp.world.pirate(), n=options.steps * options.batch, size=1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch // processes,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(tuned, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
        trainer.train()
    if trainer.is_world_process_zero():
        if options.save:
            tuned.save(options.save)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps({"processes": arguments.world_size, "losses": losses}))


if __name__ == "__main__":
    main()
