"""SpecRT's runtime: loads a bundle and executes its plan; knows nothing of models, passes or the compiler."""

from runtime.engine import Engine
from runtime.model import Event, Model, load
from runtime.request import Request
from runtime.sampling import Sampling

__all__ = ["load", "Model", "Event", "Engine", "Request", "Sampling"]
