"""Where do the trainable numbers go? One file for each answer."""

from minipeft.methods.adalora import AdaLoRA
from minipeft.methods.adapter import Adapter
from minipeft.methods.dora import DoRA
from minipeft.methods.experts import Experts
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.masked import Masked
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.vera import VeRA

__all__ = [
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "DoRA",
    "Experts",
    "Full",
    "IA3",
    "LoRA",
    "Masked",
    "PTuning",
    "PrefixTuning",
    "ProjectedLoRA",
    "PromptTuning",
    "Softmax",
    "VeRA",
    "quantize",
]
