"""What models are trained on: the pocket world's stories and tasks, real reviews, and the base models."""

from minipeft.world.base import held_out_loss, load, write
from minipeft.world.corpus import forecasts, pretty, stories
from minipeft.world.own import own
from minipeft.world.real import cache_dir, minilm_path, reviews
from minipeft.world.tasks import (
    Task,
    answer,
    cipher,
    facts,
    flip,
    forecast,
    mood,
    pirate,
    pirates,
    plain,
    stream,
    stream_floor,
)

__all__ = [
    "Task",
    "answer",
    "cache_dir",
    "cipher",
    "facts",
    "flip",
    "forecast",
    "forecasts",
    "held_out_loss",
    "load",
    "minilm_path",
    "mood",
    "own",
    "pirate",
    "pirates",
    "plain",
    "pretty",
    "reviews",
    "stories",
    "stream",
    "stream_floor",
    "write",
]
