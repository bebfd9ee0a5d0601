"""Networks by name: the EENets of the paper, and the plain ResNets without exits."""

from .eenets import eenet, names
from .resnets import resnet

__all__ = ["eenet", "names", "resnet"]
