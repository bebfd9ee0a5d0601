"""A data set's name → how to get its files, for errors."""

from __future__ import annotations


def how_to_get(name: str) -> str:
    if name == "tiny-imagenet":
        return "get tiny-imagenet-200.zip from Stanford's CS231n course page and unpack it there"
    if name == "imagenet":
        return "ask image-net.org for ILSVRC2012 and sort it into train/<class>/ and val/<class>/"
    if name == "folder":
        return "put images into train/<class>/ and val/<class>/, or into <class>/ alone"
    return "download=True (--download) fetches it there, or name the folder that holds the published files"
