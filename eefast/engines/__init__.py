"""The engines: objects that run a planned network on images; all of them give the same answers."""

from .compact import CompactEngine
from .engine import Batch, Engine
from .graphs import GraphEngine
from .program import Plan
from .reference import ReferenceEngine
from .resident import ResidentEngine

__all__ = ["Batch", "CompactEngine", "Engine", "GraphEngine", "Plan", "ReferenceEngine", "ResidentEngine"]
