"""The skeleton of the sharded jobs, by the smallest job there can be: what a new one takes is what stands here."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.jobs.arguments import ConfigError
from palindrome.jobs.config import ShardedConfig
from palindrome.jobs.sharded import Remaining, ShardedJob, run_sharded
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.runs import lease
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import add_pieces, plan_totals, read_plan
from palindrome.pipeline.runs.shards import ShardWriter, committed
from palindrome.pipeline.storage.folder import Folder

SCHEMA = pa.schema([("number", pa.int64()), ("square", pa.int64())])


# What goes to pipeline/tasks/squares.py:


@dataclass(frozen=True)
class Squares:
    """Numbers -> `squares/<shard>.parquet`."""

    run: Folder

    def process(self, model, shard):
        [piece] = shard.pieces
        with ShardWriter(self.run, "squares", shard.name, SCHEMA, {}, once=True) as out:
            numbers = range(piece.start, piece.stop)
            if 13 in numbers:
                raise ValueError("13 is unlucky")
            out.add(pa.table([list(numbers), [n * n for n in numbers]], schema=SCHEMA))
            written = out.commit({"seconds": 0.0}, {"images": len(numbers)})
            return Receipt(shard.name, len(numbers), 0, 0.0, 0.0, written)


# What goes to jobs/squares.py:


@dataclass(frozen=True, kw_only=True)
class SquaresConfig(ShardedConfig):
    """Squares of numbers."""

    count: int
    """How many."""


def run(config, checkpoint):
    def plan(out):
        pieces = (Piece("", "numbers", 0, "", i, min(i + 4, config.count)) for i in range(0, config.count, 4))
        totals = plan_totals(out) or add_pieces(out, "numbers", pieces, 4)
        done = committed(out, "squares")
        left = [shard for shard in read_plan(out) if shard.name not in done]
        print(f"{len(left)} to do")
        return Remaining(totals, len(left), iter(left))

    def finish(out, failures):
        print(f"{len(committed(out, 'squares'))} shards, {len(failures)} failed")
        return 0

    job = ShardedJob(
        name="squares",
        model=checkpoint,
        settings={},
        facts={"model_digest": checkpoint.digest},
        plan=plan,
        evaluations=0,
        written=16,
        work=lambda out, *_: Squares(out),
        finish=finish,
    )
    return run_sharded(config, job)


# And the tests:


def test_a_job_is_planned_done_and_done_once(tiny, tmp_path, capsys, times):
    config = SquaresConfig(out=str(tmp_path), count=10, inline=True)
    assert run(config, tiny) == 0
    assert "3 to do" in capsys.readouterr().out
    rows = [row for path in tmp_path.glob("squares/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(rows, key=lambda row: row["number"]) == [{"number": n, "square": n * n} for n in range(10)]
    lease.release_all()
    before = times(tmp_path)
    assert run(config, tiny) == 0
    lease.release_all()
    assert "0 to do" in capsys.readouterr().out
    assert times(tmp_path) == before


@pytest.fixture(autouse=True)
def released():
    """As at a command's end."""
    yield
    lease.release_all()


def test_a_shard_that_fails_is_named_and_the_rest_is_done(tiny, tmp_path, capsys):
    assert run(SquaresConfig(out=str(tmp_path), count=24, inline=True), tiny) == 1
    said = capsys.readouterr()
    assert "5 shards, 1 failed" in said.out
    assert "failed: ValueError: 13 is unlucky" in said.err
    assert "1 shards failed; repeat the command to retry them" in said.err


def test_another_command_is_refused(tiny, tmp_path):
    assert run(SquaresConfig(out=str(tmp_path), count=8, inline=True), tiny) == 0
    lease.release_all()
    with pytest.raises(ConfigError, match="--count was 8, now 12"):
        run(SquaresConfig(out=str(tmp_path), count=12, inline=True), tiny)


@pytest.mark.parametrize(
    "flags", [{"address": "10.0.0.1:6379"}, {"workers": (2,)}, {"gpus_per_worker": 0.5}, {"resources": '{"a": 1}'}]
)
def test_inline_takes_nothing_that_is_for_ray(flags):
    with pytest.raises(ConfigError, match=r"^--inline: "):
        SquaresConfig(out="x", count=1, inline=True, **flags)
