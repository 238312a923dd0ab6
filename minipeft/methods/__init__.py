"""Where do the trainable numbers go? One file for each answer."""

from minipeft.methods.adalora import AdaLoRA
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.vera import VeRA

__all__ = ["AdaLoRA", "BitFit", "DoRA", "Full", "IA3", "LoRA", "ProjectedLoRA", "Softmax", "VeRA", "quantize"]
