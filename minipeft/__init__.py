"""minipeft: parameter-efficient fine-tuning, from scratch, one method a file.

    import minipeft as mp
    model, tokenizer = mp.load("pocket")
    tuned = mp.attach(model, mp.LoRA(rank=8, gamma=2.0))
    mp.fit(tuned, mp.world.pirate())

`attach` and the methods need torch alone; all other names are imported when they are first used, so that
`import minipeft` costs little more than torch.
"""

from importlib import import_module

from minipeft.attach import Tuned, attach  # at once: the module of that name would else take the function's place
from minipeft.methods import METHODS

_HOME = {
    **dict.fromkeys(METHODS, "methods"),
    "quantize": "methods.qlora",
    "verbalize": "methods.prompt",
    "fit": "learn.fit",
    "evaluate": "learn.fit",
    "EarlyStop": "learn.early",
    "trivial": "learn.trivial",
    "batches": "learn.fit",
    "report": "learn.fit",
    "fit_reward": "learn.reward",
    "improve": "learn.policy",
    "integrated": "learn.feedback",
    "Distil": "learn.distill",
    "Adversarial": "learn.robust",
    "fit_many": "learn.many",
    "sweep": "learn.trials",
    "load_adapter": "serve.checkpoint",
    "export": "serve.export",
    "export_gguf": "serve.gguf",
    "Bank": "serve.tenants",
    "shipped": "course.shipped",
    "advise": "course.advice",
    "Predict": "explore.predict",
    "LoRAExplorer": "explore.lora",
    "QuantisationExplorer": "explore.quantisation",
    "AdapterExplorer": "explore.adapter",
    "PromptExplorer": "explore.prompt",
    "PrefixExplorer": "explore.prompt",
    "TemplateExplorer": "explore.prompt",
    "MemoryCalculator": "explore.budget",
    "RankExplorer": "explore.rank",
    "MixtureExplorer": "explore.mixture",
    "Preferences": "explore.preferences",
    "SitesExplorer": "explore.sites",
    "PicturesExplorer": "explore.pictures",
    "PrivacyExplorer": "explore.sites",
    "load": "world.base",
    "write": "world.base",
    "pretty": "world.corpus",
}
_ROOMS = ("world", "methods", "learn", "analyze", "serve", "explore")
__all__ = ["attach", "Tuned", *_HOME, *_ROOMS]
__version__ = "0.1.0"


def _save(tuned: Tuned, path, name: str | None = None) -> None:
    """Writes one adapter (the active one) to a directory, in Hugging Face PEFT's layout; see `serve/checkpoint.py`."""
    from minipeft.serve.checkpoint import save_adapter

    save_adapter(tuned, path, name)


Tuned.save = _save  # here, where all rooms are known: the mechanism itself knows nothing of files


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
