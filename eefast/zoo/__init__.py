"""Networks by name: the EENets of the paper and their plain ResNet twins."""

from .eenet import NAMES, eenet
from .placement import PLACEMENTS
from .resnet import resnet

__all__ = ["NAMES", "PLACEMENTS", "eenet", "resnet"]
