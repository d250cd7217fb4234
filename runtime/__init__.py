"""SpecRT's runtime: loads a bundle and executes its plan; knows nothing of models, passes or the compiler."""

from runtime.beam_request import BeamRequest
from runtime.beam_search import Beams, Hypothesis
from runtime.engine import Engine
from runtime.loading import load
from runtime.model import Event, Model
from runtime.request import Request
from runtime.sampling import Sampling

__all__ = ["load", "Model", "Event", "Engine", "Request", "Sampling", "BeamRequest", "Beams", "Hypothesis"]
