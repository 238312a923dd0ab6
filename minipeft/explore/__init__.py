"""The widgets: each is a plain function that draws a figure, and the sliders that call it."""

from minipeft.explore.adapter import AdapterExplorer
from minipeft.explore.budget import MemoryCalculator
from minipeft.explore.lora import LoRAExplorer
from minipeft.explore.mixture import MixtureExplorer
from minipeft.explore.page import let_cells_wait, tell_of_cells, watched
from minipeft.explore.predict import Predict
from minipeft.explore.preferences import Preferences
from minipeft.explore.prompt import PrefixExplorer, PromptExplorer, TemplateExplorer
from minipeft.explore.quantisation import QuantisationExplorer
from minipeft.explore.rank import RankExplorer
from minipeft.explore.runs import ready
from minipeft.explore.sites import PrivacyExplorer, SitesExplorer
from minipeft.explore.slider import SliderPlot
from minipeft.explore.worker import WORKER

if watched():
    let_cells_wait()
    tell_of_cells(WORKER.cell)
    WORKER.submit(ready)  # its imports take seconds, so they begin before an explorer is shown

__all__ = [
    "AdapterExplorer",
    "LoRAExplorer",
    "MemoryCalculator",
    "MixtureExplorer",
    "Predict",
    "Preferences",
    "PrefixExplorer",
    "PrivacyExplorer",
    "PromptExplorer",
    "QuantisationExplorer",
    "RankExplorer",
    "SitesExplorer",
    "SliderPlot",
    "TemplateExplorer",
]
