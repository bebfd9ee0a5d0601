"""Images that arrive one by one → their answers, each as soon as its image exits."""

from .answer import Answer, Closed, Overloaded
from .server import Server

__all__ = ["Answer", "Closed", "Overloaded", "Server"]
