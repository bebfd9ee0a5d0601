"""Images in parquet files → their classes on a cluster of Ray: by eefast.score, and by map_batches of Ray Data."""

from pathlib import Path

import pyarrow as pa
import ray
from pyarrow import parquet

import eefast
from eefast.data.mnist import mnist_test
from eefast.integrations.ray import Score

SHIPPED = Path(eefast.__file__).parent / "assets/eenet-mnist"

if __name__ == "__main__":
    images, labels = mnist_test()
    pixels = [image.numpy().tobytes() for image in images[:400]]
    Path("shards").mkdir()
    parquet.write_table(pa.table({"image": pixels, "id": list(range(400))}), "shards/0.parquet")
    ray.init(num_cpus=2, include_dashboard=False)

    # Resumable, one worker process per part of the cluster: what `eefast score --ray` runs.
    done = eefast.score(SHIPPED, "shards", "scored", ray="auto", workers=1, threads_per_worker=1, shard_size=200)
    print(f"{done.images} images, mean cost {done.mean_cost:.3f}")

    # In a pipeline of your own.
    data = ray.data.from_numpy(images[:400].numpy()).rename_columns(["image"])
    answers = data.map_batches(
        Score, fn_constructor_args=(SHIPPED,), batch_size=200, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
    )
    print(f"mean exit {answers.mean('exit'):.2f}")
