"""Where do the trainable numbers go? One file for each answer."""

from minipeft.methods.adapter import Adapter
from minipeft.methods.experts import Experts
from minipeft.methods.lora import LoRA
from minipeft.methods.masked import Masked
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.select import BitFit, Full, Softmax

__all__ = [
    "Adapter",
    "BitFit",
    "Experts",
    "Full",
    "LoRA",
    "Masked",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Softmax",
]
