"""Where do the trainable numbers go? One file for each answer."""

from minipeft.methods.lora import LoRA
from minipeft.methods.qlora import quantize
from minipeft.methods.select import BitFit, Full, Softmax

__all__ = ["BitFit", "Full", "LoRA", "Softmax", "quantize"]
