"""An array of images → their classes on a cluster of Ray: by eefast.score, and by map_batches of Ray Data."""

from pathlib import Path

import numpy as np
import ray

import eefast
from eefast.data.mnist import mnist_test
from eefast.integrations.ray import Score

SHIPPED = Path(eefast.__file__).parent / "assets/eenet-mnist"

if __name__ == "__main__":
    images, labels = mnist_test()
    np.save("images.npy", images[:400].numpy())
    ray.init(num_cpus=2, include_dashboard=False)

    # Resumable, one worker process per part of the cluster: what `eefast score --ray` runs.
    done = eefast.score(SHIPPED, "images.npy", "scored", ray="auto", workers=1, threads_per_worker=1, shard_size=200)
    print(f"{done.images} images, mean cost {done.mean_cost:.3f}")

    # In a pipeline of your own; Ray Data needs pandas for it.
    data = ray.data.from_numpy(images[:400].numpy()).rename_columns(["image"])
    answers = data.map_batches(
        Score, fn_constructor_args=(SHIPPED,), batch_size=200, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
    )
    print(f"mean exit {answers.mean('exit'):.2f}")
