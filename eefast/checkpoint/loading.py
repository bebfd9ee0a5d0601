"""A checkpoint on disk → a network: a folder that `EarlyExitNet.save` wrote, or a file of the reference repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import EarlyExitNet
from . import CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE
from .folder import OLD_CONFIG_FILE, read_folder
from .reference import REFERENCE, read_reference

HUB_NAME = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
"""owner/name of a repository."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, what is wrong with it and what to do."""


def load(
    path: str | Path,
    *,
    input_shape: Sequence[int] | None = None,
    head: str | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> EarlyExitNet:
    """The network in `path`, on the CPU, in eval mode, in the dtype that it was saved in.

    path: a folder that `EarlyExitNet.save` or `eefast train` wrote; or a file of the reference implementation of EENets
        (eksuas/eenets.pytorch, and its fork PTEENet), either `torch.save(model)` or `torch.save(model.state_dict())`,
        in the format of any torch version. No code in the file is ever run.

    The other arguments are for files of the reference only:
    input_shape: (C, H, W) of the images; needed where the file does not say it: every state_dict, every EENet-8.
    head: the exit type that you expect, see `eefast.heads.ExitHead`; an error where the file has another. Give "bnpool"
        for a state_dict: its BatchNorms are in the pickled module only, so that without them it looks like "pool".
    normalization: (mean, std) of the training images, see `EarlyExitNet`.

    Thresholds are those in the folder; of a reference file, the module's `exit_threshold`, or 0.5 where it has none.
    The reference left the BatchNorms of `bnpool` exits in training mode; here they use their running statistics.
    Weights in a larger checkpoint are found under "state_dict", "model" and the like, see
    `eefast.checkpoint.state_dict.weights`, also with "module.", "_orig_mod." or "model." before their names.
    A file of any origin takes at most 4 times its size plus 200 MB of memory, and 2 s plus 1 s per 100 MB.
    Raises `CheckpointError` for any other file, for one that is damaged or incomplete, and for weights that are NaN or
    infinite. A backbone of timm needs timm, one of torchvision torchvision.
    """
    path = Path(path)
    try:
        with torch.inference_mode(False):  # what is made in it nothing outside may write to
            return _load(path, input_shape, head, normalization)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # what a file makes Python or torch raise is the file's fault
        text = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{path}: it cannot be loaded ({type(error).__name__}: {text})") from error


def _load(
    path: Path,
    input_shape: Sequence[int] | None,
    head: str | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
) -> EarlyExitNet:
    if path.is_file() and path.name in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, OLD_CONFIG_FILE):
        raise ValueError("give the folder that this file is in")
    if not path.exists() and HUB_NAME.fullmatch(str(path)):
        raise ValueError(
            f"there is no such file or folder; a repository of the Hub is downloaded by "
            f'eefast.EarlyExitNet.from_pretrained("{path}")'
        )
    if not path.is_dir():
        return read_reference(path, input_shape, head, normalization)
    if not (input_shape is None and head is None and normalization is None):
        raise ValueError(
            f"input_shape, head and normalization are for files of {REFERENCE}; leave them out, the folder has them"
        )
    return read_folder(path)
