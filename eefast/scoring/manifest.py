"""Network, input and options → manifest.json: the shards, and a hash of all that their rows depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import fingerprints
from ..model import EarlyExitNet
from ..preprocessing import Preprocessing
from ..rules import Rule
from ..system import files
from .chunks import Shard, Source

MANIFEST_FILE, LISTING_FILE = "manifest.json", "inputs.jsonl"


@dataclass(frozen=True)
class Manifest:
    """digest: a hash of all that the rows depend on; shards: of all images, whoever answers them."""

    digest: str
    shards: Sequence[Shard]


def describe_network(net: EarlyExitNet, how: Preprocessing | None) -> dict[str, Any]:
    """All of a network that its answers depend on; how: images are prepared, None for pixels."""
    rule = net.exit_rule
    return {
        **({"rule": rule.rows} if isinstance(rule, Rule) else {}),
        "name": net.name,
        "layers": net.layers(),
        "weights": fingerprints.weights(net),
        "input_shape": list(net.input_shape),
        "criterion": net.criterion.name,
        "thresholds": [repr(value) for value in net.thresholds.tolist()],  # JSON has no infinities
        "normalization": net.normalization and [list(map(float, part)) for part in net.normalization],
        "preprocessing": how and asdict(how),
        "classes": net.classes and list(net.classes),
    }


def write_manifest(
    folder: Path, network: dict[str, Any], source: Source, options: dict[str, Any], shard_size: int, overwrite: bool
) -> Manifest:
    """List the input, compare with the manifest that is there, write it and the listing.

    Raises `ValueError` where `folder` holds the rows of another network, input or other options, which `overwrite`
    removes instead, and for an input without images.
    """
    with files.replaced(folder / LISTING_FILE) as listing:
        shards = source.plan(shard_size, listing)
        if not shards:
            raise ValueError("the input has no images; give one that has some")
        listing.flush()
        inputs = _hash(Path(listing.name))
        parts = {
            "network": network,
            "input": {**source.describe(), "images": sum(shard.count for shard in shards), "listing": inputs},
            "options": {**options, "shard_size": shard_size},
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        _check(folder, digest, parts, overwrite)
    text = {"format": 1, "digest": digest, **parts, "shards": [[shard.count, *shard.place] for shard in shards]}
    files.write(folder / MANIFEST_FILE, json.dumps(text, ensure_ascii=False) + "\n")
    return Manifest(digest, shards)


def _hash(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def _check(folder: Path, digest: str, parts: dict[str, Any], overwrite: bool) -> None:
    path = folder / MANIFEST_FILE
    there = sorted(folder.glob("part-*.parquet"))
    if overwrite or (not path.exists() and not there):
        found = _digest_of(path)
        for part in there if found != digest else ():
            part.unlink()
        return
    found = _digest_of(path)
    if found != digest:
        different = _difference(path, parts)
        raise ValueError(
            f"{folder} holds the rows of {different}; take another folder, or remove these rows by --overwrite"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest_of(path: Path) -> Any:
    return _read(path).get("digest")


def _difference(path: Path, parts: dict[str, Any]) -> str:
    """What was different when they were made, in words."""
    found = _read(path)
    for part, what in (("network", "another network"), ("input", "another input"), ("options", "other options")):
        before = found.get(part)
        if not isinstance(before, dict):
            return "an unknown run, whose manifest.json is missing or damaged"
        keys = sorted(key for key in parts[part].keys() | before.keys() if parts[part].get(key) != before.get(key))
        if keys:
            return f"{what} ({', '.join(keys)})"
    return "another version of eefast"
