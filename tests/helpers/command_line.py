"""Commands run in this process, and a folder with images and a network for them."""

import torch
from typer.testing import CliRunner

from eefast.cli.commands import app
from eefast.data import datasets


def run(*words):
    """The command in this process, whose errors are raised."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done


def held_out_of(folder, n, seed):
    kept = datasets.dataset("mnist", folder, "train")
    split = torch.utils.data.random_split(kept, [len(kept) - n, n], generator=torch.Generator().manual_seed(seed))[1]
    return kept.images[split.indices], kept.labels[split.indices]
