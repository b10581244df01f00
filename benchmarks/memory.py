"""Peak memory of a worker that encodes: by batch size, by shard size, by precision.

python -m benchmarks.memory [--model DIR] [--images FILE] [--batch 16 64 256] [--shards 256 1024] [--precisions ...]

Each row encodes one shard, of images repeated from the file, on its own Ray, by an inversion of one step: the number of
steps does not affect memory. `worker_mib` is the peak memory of the worker process, including libraries, and `gpu_mib`
is the peak of GPU memory that torch allocated. Prints one JSON object.
"""

import argparse
import json
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.scale import _peak
from palindrome.infra.cluster import connect
from palindrome.model import families
from palindrome.model.execution import PRECISIONS, Execution
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import choose_resources, run_shards
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.encode import Encode

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"), help="a column `img`")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--shards", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"])
    args = parser.parse_args()
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for precision in args.precisions:
            settings = [(batch, args.shards[-1]) for batch in args.batch]
            settings += [(args.batch[0], shard) for shard in args.shards[:-1]]
            rows += [pool.apply(encoding, (args.model, args.images, precision, *setting)) for setting in settings]
    print(json.dumps({"model": Path(args.model).name, "rows": rows}, indent=2))


@dataclass(frozen=True)
class Measured:
    """Encode, followed by writing the worker's peak memory in MiB."""

    encode: Encode
    peaks: Path

    def process(self, model: Model, shard: Shard) -> Receipt:
        receipt = self.encode.process(model, shard)
        peaks = {"worker_mib": round(_peak())}
        if torch.cuda.is_available():
            peaks["gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        self.peaks.write_text(json.dumps(peaks))
        return receipt


def encoding(model: str, images: str, precision: str, batch: int, shard: int) -> dict[str, Any]:
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    loaded = families.load(absolute(model))
    with tempfile.TemporaryDirectory() as folder:
        column = pq.read_table(images, columns=["img"])["img"]
        again = pa.chunked_array(column.chunks * -(-shard // len(column))).slice(0, shard)
        pq.write_table(pa.table({"img": again}), f"{folder}/images.parquet", row_group_size=1000)
        collection, run = open_collection(f"{folder}/images.parquet"), Folder(f"{folder}/run")
        write_plan(run, collection, shard)
        channels, size, _ = loaded.image_shape
        reader = Reader(collection, Preprocess(size, channels), batch, False)
        encode = Encode(run, reader, Inversion((-1, 0), 0), False, {})
        with connect("local"):
            resources, execution = choose_resources([1], "actor"), Execution(precision)
            measured = Measured(encode, Path(folder, "peaks"))
            outcomes = run_shards(measured, loaded, read_plan(run), resources, execution)
            [receipt] = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
        assert receipt.images == shard, receipt
        return {"precision": precision, "batch": batch, "shard": shard, **json.loads(Path(folder, "peaks").read_text())}


if __name__ == "__main__":
    main()
