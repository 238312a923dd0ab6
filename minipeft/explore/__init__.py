"""The widgets: each is a plain function that draws a figure, and the sliders that call it."""

from minipeft.explore.budget import MemoryCalculator
from minipeft.explore.lora import LoRAExplorer
from minipeft.explore.predict import Predict
from minipeft.explore.rank import RankExplorer
from minipeft.explore.slider import SliderPlot

__all__ = ["LoRAExplorer", "MemoryCalculator", "Predict", "RankExplorer", "SliderPlot"]
