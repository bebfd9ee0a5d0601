"""Network → a commit in a repository of the Hub; the name of a repository, or a folder → network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE
from ..checkpoint.folder import save
from ..checkpoint.loading import HUB_NAME, load
from ..model import EarlyExitNet
from ..system import files
from ..thresholds.evaluation import Evaluation
from .model_card import card

FILES = (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE)
"""What is fetched: JSON and safetensors, no code and no pickles."""
CARD_FILE = "README.md"


def push(
    net: EarlyExitNet,
    repo_id: str,
    *,
    evaluation: Evaluation | None,
    evaluated_on: str | None,
    private: bool | None,
    revision: str | None,
    token: str | None,
    message: str,
) -> str:
    """See `EarlyExitNet.push_to_hub`."""
    _check_name(repo_id)
    net.check_saving()
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save(net, folder)
        files.write(Path(folder) / CARD_FILE, card(net, repo_id, evaluation, evaluated_on))
        client = hub.HfApi(token=token)
        client.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(repo_id, branch=revision, exist_ok=True)
        made = client.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[*FILES, CARD_FILE],
            # A record of another network would contradict this one.
            delete_patterns=None if net.record else [RECORD_FILE],
        )
    return str(made.commit_url)


def pull(source: str | Path, *, revision: str | None, cache_dir: str | Path | None, token: str | None) -> EarlyExitNet:
    """See `EarlyExitNet.from_pretrained`."""
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories, and {source} is a folder; leave it out")
        return load(source)
    repo_id = str(source)
    _check_name(repo_id)
    hub = _hub()
    try:
        folder = hub.snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=list(FILES)
        )
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id!r} is no folder here, and the Hub has no such repository{at} that you may read; check the name, "
            "or log in by `hf auth login` for a private one"
        ) from error
    return load(folder)


def _check_name(repo_id: str) -> None:
    if not HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no folder and no name of a repository; give a folder or owner/name")


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the Hub needs huggingface_hub: pip install "eefast[hub]"', name=error.name
        ) from error
    return huggingface_hub
