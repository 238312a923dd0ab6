"""Where do the trainable numbers go? One file for each answer, and one line for each here.

From its line follow a method's public name, `mp.<name>`, its file layout, and its place in the tests, the sweep and the
formulas; see `docs/add_a_method.md`.
"""

from minipeft.layer import Method
from minipeft.methods.adalora import AdaLoRA
from minipeft.methods.adapter import Adapter
from minipeft.methods.dora import DoRA
from minipeft.methods.experts import Experts
from minipeft.methods.hira import HiRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.masked import Masked
from minipeft.methods.miss import MiSS
from minipeft.methods.oft import OFT
from minipeft.methods.pissa import PiSSALayer  # makes LoRA(init="pissa") known
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.shira import SHiRA
from minipeft.methods.subspace import Subspace
from minipeft.methods.vera import VeRA

METHODS = {name: each for name, each in list(globals().items()) if isinstance(each, type) and issubclass(each, Method)}
METHODS.pop("Method")
__all__ = [*METHODS]
