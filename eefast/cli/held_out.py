"""The options held-out and seed → the held-out training images, and the outputs of all exits on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import RECORD_FILE
from ..system.progress import Progress
from .inputs import Source, load_images
from .output import note

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Subset

    from ..model import EarlyExitNet
    from ..result import ExitOutput


class HeldOutImages:
    """The training images that were kept aside, as in training or as the options say.

    count, seed: the options; None for those of training, or where they are not known, the defaults of `eefast train`.
    least: the smallest number of images allowed, see `budget.least_images`; None for any.
    Raises `ValueError` where images that the network was trained on would be among them.
    """

    def __init__(self, source: Source, count: int | None, seed: int | None, least: int | None) -> None:
        record = source.record
        if record is not None:
            for option, given, trained in (("--seed", seed, record.seed), ("--held-out", count, record.held_out)):
                # A smaller number selects the last of the images that were kept aside.
                if given is not None and (given > trained if option == "--held-out" else given != trained):
                    raise ValueError(
                        f"{option} {given}: {source.network} was trained with {trained}, so images that it was trained "
                        f"on would be among the held-out ones; leave {option} out, or add --other-data to use them"
                    )
        self.source, self.least = source, least
        self.count = count if count is not None or record is None else record.held_out
        self.seed = seed if seed is not None else record.seed if record is not None else 1

    def images(self, net: EarlyExitNet) -> Subset:
        """These images with their labels, in random order."""
        from ..data import loaders

        whole = load_images(net, self.source, "train")
        self._check_unchanged(whole)
        if self.count is None:
            self.count = self._default_count(len(whole))
        _, kept = loaders.split(whole, self.count, self.seed)
        self._check_enough(self.count)
        return kept

    def first(self, net: EarlyExitNet, count: int) -> Tensor:
        """`count` of these images, or all, without labels: [n, C, H, W] uint8."""
        import torch
        from torch.utils.data import Subset

        from ..data import loaders

        kept = self.images(net)
        some = Subset(kept, range(min(count, len(kept))))
        return torch.cat([x for x, _ in loaders.batches(some, 64, self.source.workers)])

    def outputs(
        self, net: EarlyExitNet, cache: Path | None, batch_size: int, progress: Progress
    ) -> tuple[list[ExitOutput], Tensor]:
        """Outputs of all exits on these images, read from the cache if it has them, and the labels."""
        from .. import fingerprints
        from ..data import loaders
        from ..thresholds import outputs

        cached = cache is not None and cache.exists()
        kept = None if cached and self.count is not None else self.images(net)
        assert self.count is not None
        source = {
            "network": fingerprints.weights(net),
            "images": f"{self.count} of {self.source.dataset} by seed {self.seed}",
        }
        if cache is not None and cached:
            self._check_enough(self.count)
            return outputs.load_outputs(cache, source)
        assert kept is not None
        batches = loaders.batches(kept, batch_size, self.source.workers)
        found = outputs.collect(net, batches.reported("held-out images", progress))
        if cache is not None:
            outputs.save_outputs(cache, *found, source)
        return found

    def _default_count(self, total: int) -> int:
        from ..data import loaders

        count = loaders.default_held_out(total)
        why = "--other-data" if self.source.other_data else f"{self.source.network} has no {RECORD_FILE}"
        note(
            f"{why}: the held-out images are the {count:,} that eefast train keeps aside by default with seed "
            f"{self.seed}; --held-out and --seed name others"
        )
        return count

    def _check_unchanged(self, whole: Any) -> None:
        from ..data import image_sets

        record = self.source.record
        if record is not None and (len(whole), image_sets.fingerprint(whole)) != (record.images, record.fingerprint):
            raise ValueError(
                f"the {len(whole):,} training images of {self.source.dataset} in {self.source.data_root or 'data'} are "
                f"not the {record.images:,} that {self.source.network} was trained on, so the ones kept aside are not "
                "known; name the folder with those images, or add --other-data to use these"
            )

    def _check_enough(self, count: int) -> None:
        if self.least is not None and count < self.least:
            record = self.source.record
            no_more = record is not None and count == record.held_out
            way_out = "train with more kept aside" if no_more else "use more with --held-out"
            raise ValueError(
                f"{count} held-out images are too few: one of them is {1 / count:.4f} of the accuracy, so {self.least} "
                f"are needed for this budget; {way_out}, or add --few-images to choose on these"
            )
