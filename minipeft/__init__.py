"""minipeft: parameter-efficient fine-tuning, from scratch, one method a file.

    import minipeft as mp
    model, tokenizer = mp.load("pocket")
    tuned = mp.attach(model, mp.LoRA(rank=8, gamma=2.0))
    mp.fit(tuned, mp.world.pirate())

All names but `attach` are imported when they are first used, so that `import minipeft` costs little more than torch.
"""

from importlib import import_module

from minipeft.attach import Tuned, attach  # at once: the module of that name would else take the function's place

_HOME = {
    "LoRA": "methods.lora",
    "ProjectedLoRA": "methods.projected",
    "AdaLoRA": "methods.adalora",
    "DoRA": "methods.dora",
    "VeRA": "methods.vera",
    "IA3": "methods.ia3",
    "Full": "methods.select",
    "BitFit": "methods.select",
    "Softmax": "methods.select",
    "quantize": "methods.qlora",
    "Masked": "methods.masked",
    "Adapter": "methods.adapter",
    "Experts": "methods.experts",
    "PromptTuning": "methods.prompt",
    "PTuning": "methods.prompt",
    "PrefixTuning": "methods.prefix",
    "verbalize": "methods.prompt",
    "Subspace": "analyze.intrinsic",
    "fit": "learn.fit",
    "evaluate": "learn.fit",
    "batches": "learn.fit",
    "report": "learn.fit",
    "load_adapter": "serve.checkpoint",
    "shipped": "course.shipped",
    "Predict": "explore.predict",
    "LoRAExplorer": "explore.lora",
    "QuantisationExplorer": "explore.quantisation",
    "AdapterExplorer": "explore.adapter",
    "PromptExplorer": "explore.prompt",
    "PrefixExplorer": "explore.prompt",
    "TemplateExplorer": "explore.prompt",
    "MemoryCalculator": "explore.budget",
    "RankExplorer": "explore.rank",
    "load": "world.base",
    "write": "world.base",
    "pretty": "world.corpus",
}
_ROOMS = ("world", "methods", "learn", "analyze", "serve", "explore")
__all__ = ["attach", "Tuned", *_HOME, *_ROOMS]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"minipeft.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"minipeft.{name}")
    raise AttributeError(f"minipeft has no {name!r}: it has {', '.join(__all__)}.")


def __dir__():
    return __all__
