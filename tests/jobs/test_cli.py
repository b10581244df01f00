"""The command line: what is wrong is said in one line that names the flag, before a file is written or Ray started."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.jobs.command import CLUSTER_COMMANDS, JOBS
from palindrome.model.families import unet2d

ROOT = Path(__file__).parents[2]
# Runs the commands on standard input one after the other, without a Ray: prints exit code, output, whether Ray is up.
SEVERAL = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from palindrome.jobs.__main__ import main
ends = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as e:
            code = e.code
    ray = sys.modules.get("ray")
    ends.append([code, out.getvalue(), err.getvalue(), bool(ray and ray.is_initialized())])
json.dump(ends, sys.stdout)
"""
ENCODE = "encode --images SAMPLE --model MODEL --out OUT"
TRAIN = "train --images SAMPLE --preset tiny --out OUT"
WRONG = {
    "an unknown scheme": ("encode --images nosuch://x --model MODEL --out OUT", "--images: nosuch://x"),
    "images that are not there": ("encode --images IN/none --model MODEL --out OUT", "IN/none does not exist"),
    "an empty folder": ("encode --images IN/empty --model MODEL --out OUT", "--images: IN/empty holds no files"),
    "a glob without a match": ("encode --images IN/*.none --model MODEL --out OUT", "--images: IN/*.none"),
    "a Parquet file that is none": ("encode --images IN/fake.parquet --model MODEL --out OUT", "--images: "),
    "a Parquet file of numbers": ("encode --images IN/numbers.parquet --model MODEL --out OUT", "--image-column: "),
    "two columns of bytes": ("encode --images IN/two.parquet --model MODEL --out OUT", "--image-column: "),
    "an unknown column to keep": (f"{ENCODE} --keep nosuch", "--keep: column 'nosuch' is not in"),
    "a column to keep with our name": ("encode --images IN/two.parquet --image-column a --keep mse --out OUT "
                                       "--model MODEL", "--keep: column 'mse'"),
    "a column to keep of files": ("encode --images IN/pictures --model MODEL --out OUT --keep label", "--keep: "),
    "an unknown image column": (f"{ENCODE} --image-column nosuch", "--image-column: column 'nosuch' does not exist"),
    "an image column of numbers": (f"{ENCODE} --image-column label", "--image-column: column 'label' has no bytes"),
    "a model that is not there": ("encode --images SAMPLE --model IN/none --out OUT", "--model: IN/none"),
    "a model of an unknown scheme": ("encode --images SAMPLE --model nosuch://x --out OUT", "--model: "),
    "a config that is not JSON": ("encode --images SAMPLE --model IN/broken --out OUT", "unet/config.json is not JSON"),
    "weights that are cut": ("encode --images SAMPLE --model IN/cut --out OUT", "diffusion_pytorch_model.safetensors"),
    "a scheduler we can't walk": ("encode --images SAMPLE --model IN/cosmic --out OUT", "beta_schedule is 'cosmic'"),
    "more steps than timesteps": (f"{ENCODE} --steps 1001", "--steps: 1001 steps do not fit"),
    "no steps": (f"{ENCODE} --steps 0", "--steps: 0 is out of range; it takes 1 or more"),
    "negative steps": (f"{ENCODE} --steps -3", "--steps: -3 is out of range"),
    "steps that are no number": (f"{ENCODE} --steps ten", "--steps: invalid int value: 'ten'"),
    "no workers": (f"{ENCODE} --workers 0", "--workers: 0 is out of range"),
    "fewer workers than there must be": (f"{ENCODE} --workers 3 2",
                                         "--workers: must be MAX, or MIN MAX with MIN <= MAX; got 3 2"),
    "three numbers of workers": (f"{ENCODE} --workers 1 2 3",
                                 "--workers: must be MAX, or MIN MAX with MIN <= MAX; got 1 2 3"),
    "empty shards": (f"{ENCODE} --shard-size 0", "--shard-size: 0 is out of range"),
    "empty batches": (f"{ENCODE} --batch-size 0", "--batch-size: 0 is out of range"),
    "a limit of none": (f"{ENCODE} --limit 0", "--limit: 0 is out of range"),
    "no pixels": (f"{ENCODE} --max-pixels 0", "--max-pixels: 0 is out of range"),
    "an unknown dtype": (f"{ENCODE} --dtype int8", "--dtype: invalid choice: 'int8'"),
    "an unknown ladder": (f"{ENCODE} --ladder cubic", "--ladder: 'cubic' is not one of linear, quadratic, logsnr"),
    "a ladder that falls": (f"{ENCODE} --ladder 5,3", "--ladder: '5,3' is not one of"),
    "a ladder above the schedule": (f"{ENCODE} --ladder 5,1000", "increases strictly and stays below 1000"),
    "a ladder file that is not there": (f"{ENCODE} --ladder IN/none.json", "--ladder: "),
    "a ladder of other steps": (f"{ENCODE} --ladder 5,9 --steps 3", "5,9 has 2 steps, but --steps is 3"),
    "a tolerance of nothing": (f"{ENCODE} --tolerance 0", "--tolerance: '0' is neither a number above 0 nor exact"),
    "a tolerance that is no number": (f"{ENCODE} --tolerance some", "--tolerance: 'some' is neither"),
    "a tolerance of plain inversion": (f"{ENCODE} --tolerance exact --corrections 0", "--tolerance: with"),
    "a calibration that is no file": ("calibrate --images SAMPLE --model MODEL --steps 3 --out OUT", "--out: "),
    "a calibration above the schedule": ("calibrate --images SAMPLE --model MODEL --steps 3 --top 1000 --out OUT.json",
                                         "--top: 3 steps do not fit"),
    "a calibration without images": ("calibrate --images IN/none --model MODEL --steps 3 --out OUT.json",
                                     "--images: IN/none does not exist"),
    "a sweep of nothing": ("sweep --images SAMPLE --model MODEL --out OUT --max-nfe 3", "--max-nfe: every setting"),
    "a sweep over an unknown ladder": ("sweep --images SAMPLE --model MODEL --out OUT --ladder linear cubic",
                                       "--ladder: 'cubic' is not one of"),
    "a sweep of too many steps": ("sweep --images SAMPLE --model MODEL --out OUT --steps 1001", "--steps: 1001 steps"),
    "a sweep below no tolerance": ("sweep --images SAMPLE --model MODEL --out OUT --tolerance -1",
                                   "--tolerance: -1.0 is out of range"),
    "a sweep of an unknown dtype": ("sweep --images SAMPLE --model MODEL --out OUT --dtype int8", "--dtype: "),
    "an unknown place to decode": (f"{ENCODE} --decode moon", "--decode: invalid choice: 'moon'"),
    "an unknown flag": (f"{ENCODE} --frobnicate 3", "unrecognized arguments: --frobnicate"),
    "a misspelt flag": ("encode --imagse SAMPLE --model MODEL --out OUT",
                        "unrecognized arguments: --imagse; did you mean --images?"),
    "an abbreviated flag": (f"{ENCODE} --step 3", "unrecognized arguments: --step; did you mean --steps?"),
    "a missing flag": ("encode --images SAMPLE --out OUT", "required: --model"),
    "a flag without its value": (f"{ENCODE} --steps", "--steps: expected one argument"),
    "an unknown job": ("enkode --images SAMPLE", "no command 'enkode'; did you mean 'encode'?"),
    "no job": ("", "required: COMMAND"),
    "an out folder of an unknown scheme": ("encode --images SAMPLE --model MODEL --out nosuch://x", "--out: "),
    "an out that is a file": ("encode --images SAMPLE --model MODEL --out IN/fake.parquet", "--out: "),
    "an out folder of something else": ("encode --images SAMPLE --model MODEL --out IN/pictures",
                                        "--out: IN/pictures is not empty and is not a run folder"),
    "an out folder with another run.json": ("encode --images SAMPLE --model MODEL --out IN/foreign", "--out: "),
    "a batch that workers can't share": (f"{TRAIN} --batch-size 3 --workers 2",
                                         "--batch-size: 3 is not divisible by --workers 2"),
    "an unknown preset": ("train --images SAMPLE --preset huge --out OUT", "--preset: invalid choice: 'huge'"),
    "no preset": ("train --images SAMPLE --out OUT", "required: --preset"),
    "a negative learning rate": (f"{TRAIN} --lr -1", "--lr: -1.0 is out of range"),
    "a decay above one": (f"{TRAIN} --ema 1.5", "--ema: 1.5 is out of range; it takes 0 to 1"),
    "no training steps": (f"{TRAIN} --train-steps 0", "--train-steps: 0 is out of range"),
    "training images that are not there": ("train --images IN/none --preset tiny --out OUT", "--images: IN/none"),
    "latents that are not there": ("reconstruct --latents IN/none --out OUT", "--latents: IN/none does not exist"),
    "latents that are no run": ("reconstruct --latents IN/pictures --out OUT", "is not a run folder"),
    "no latents": ("reconstruct --out OUT", "required: --latents"),
    "the status of nothing": ("status", "the following arguments are required: RUN"),
    "the status of an unknown scheme": ("status nosuch://x", "RUN: Protocol not known: nosuch"),
    "a sample of none": ("verify IN/pictures --deep 0", "--deep: 0 is out of range"),
    "an unknown reason": ("rejects IN/pictures --reason ennui", "--reason: must be one of empty, null"),
    "an unknown format": ("rejects IN/pictures --format xml", "--format: invalid choice: 'xml'"),
    "no number of samples": ("generate --model MODEL --count 0 --out OUT", "--count: 0 is out of range"),
    "an eta above 1": ("generate --model MODEL --count 1 --eta 1.5 --out OUT", "--eta: 1.5 is out of range"),
    "clipped DDIM": ("generate --model MODEL --count 1 --clip --out OUT", "--clip: requires --eta above 0"),
    "two kinds of noise": ("generate --model MODEL --count 1 --eta 1 --sigma-hat --out OUT", "--sigma-hat: can"),
    "more steps to generate than timesteps": ("generate --model MODEL --count 1 --steps 1001 --out OUT", "--steps: "),
    "variations that would be alike": ("regenerate --latents IN/none --variations 2 --out OUT", "--variations: "),
    "latents that are none": ("regenerate --latents IN/pictures --out OUT", "IN/pictures is not a run folder"),
    "an export of no format": ("export IN/pictures --out OUT", "required: --format"),
    "an export of an unknown format": ("export IN/pictures --out OUT --format gif", "--format: invalid choice: 'gif'"),
    "an export of no quality": ("export IN/pictures --out OUT --format jpeg --quality 0",
                               "--quality: 0 is out of range"),
    "the quality of what is lossless": ("export IN/pictures --out OUT --format png --quality 90",
                                        "--quality: png is lossless"),
    "an export of an unknown scheme": ("export nosuch://x --out OUT --format png", "RUN: Protocol not known: nosuch"),
    "no decoding steps": ("reconstruct --latents IN/none --out OUT --steps 5 0", "--steps: 0 is out of range"),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tiny, corpus, tmp_path_factory):
    """A folder of inputs that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "empty").mkdir()
    corpus.good_images(folder / "pictures", 3)
    (folder / "fake.parquet").write_text("PAR1 but no Parquet")
    (folder / "foreign").mkdir()
    (folder / "foreign/run.json").write_text('{"hello": 1}')
    pq.write_table(pa.table({"n": [1]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"a": [b""], "b": [b""], "mse": [0.0]}), folder / "two.parquet")
    for name in ("broken", "cut", "cosmic"):
        unet2d.save(tiny, str(folder / name))
    (folder / "broken" / unet2d.CONFIG).write_text("{")
    weights = folder / "cut" / unet2d.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    scheduler = folder / "cosmic" / unet2d.SCHEDULER
    scheduler.write_text(scheduler.read_text().replace('"linear"', '"cosmic"'))
    return folder


@pytest.fixture(scope="module")
def places(inputs, model, sample, tmp_path_factory):
    return {"SAMPLE": sample, "MODEL": model, "IN": inputs, "OUT": tmp_path_factory.mktemp("out")}


def _filled(text, places, number=0):
    for name, path in places.items():
        text = re.sub(rf"\b{name}\b", f"{path}/{number}" if name == "OUT" else str(path), text)
    return text


@pytest.fixture(scope="module")
def ends(places):
    """How each of the wrong commands ended: name -> (code, out, err, Ray is up), and what it left in its --out."""
    before = {path: path.stat().st_mtime_ns for path in places["IN"].rglob("*")}
    commands = [_filled(words, places, i).split() for i, (words, _) in enumerate(WRONG.values())]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # where nothing listens
    run = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        input=json.dumps(commands),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {path: path.stat().st_mtime_ns for path in places["IN"].rglob("*")} == before
    return dict(zip(WRONG, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused(ends, places, what):
    code, out, err, ray_is_up = ends[what]
    number = list(WRONG).index(what)
    assert code == 2
    assert out == ""
    assert re.match(rf"palindrome( ({'|'.join(JOBS)}))?: error: ", err)
    assert err.endswith("\n") and err.count("\n") == 1, "one line"
    assert _filled(WRONG[what][1], places) in err
    assert not (places["OUT"] / str(number)).exists(), "something was written"
    assert not ray_is_up


def test_the_exit_code_of_the_process_is_that_of_the_command():
    command = [sys.executable, "-m", "palindrome", "encode", "--steps", "0", "--images", "x", "--model", "y"]
    process = subprocess.run([*command, "--out", "z"], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "palindrome encode: error: --steps: 0 is out of range; it takes 1 or more\n"


def test_an_address_where_nothing_listens(start, pictures, model, tmp_path):
    command = ["encode", "--images", pictures, "--model", model, "--out", tmp_path / "run"]
    process = start(*command, "--address", "127.0.0.1:1")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == "palindrome encode: error: --address: nothing answers at 127.0.0.1:1: Connection refused\n"
    assert not (tmp_path / "run/latents").exists()


def test_the_environment_names_a_cluster_too(start, pictures, model, tmp_path):
    command = ["encode", "--images", pictures, "--model", model, "--out", tmp_path / "run"]
    process = start(*command, RAY_ADDRESS="127.0.0.1:1")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "--address: nothing answers at 127.0.0.1:1" in err


def test_the_installed_command_is_the_same():
    command = Path(sys.executable).with_name("palindrome")
    if not command.exists():
        pytest.skip("palindrome is not installed")
    run = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    text = " ".join(run.stdout.split())
    assert all(f"{job} {words}" in text for job, words in JOBS.items())


@pytest.mark.parametrize("job", JOBS)
def test_help_names_every_flag_with_words_and_default(palindrome, job):
    said = palindrome(job, "--help")
    assert said.code == 0
    flags = re.findall(r"^  (--[a-z-]+)", said.out, re.MULTILINE)
    text = " ".join(said.out.split())
    if job in ("status", "verify", "rejects", "export", "animate"):  # which read a run folder
        assert "RUN The run folder" in text and flags
        return
    if job in CLUSTER_COMMANDS:
        assert "The URL of the cluster's dashboard" in text and "--address" in flags
        return
    if job == "convert":  # which computes nothing
        assert flags[:3] == ["--model", "--out", "--allow-pickle"] and "--address" not in flags
        return
    assert "--out" in flags and ("--address" in flags) == (job not in ("watermark", "direction"))
    if job not in ("calibrate", "watermark", "direction"):  # whose one file is written at the end
        assert "Repeating the command resumes it." in text
    assert "(default: 64; " in text or job in ("train", "calibrate", "watermark", "direction")


@pytest.fixture(scope="module")
def run(palindrome, pictures, model, tmp_path_factory):
    """A finished run of encode, and its command."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command = ["encode", "--images", pictures, "--model", model, "--out", out, "--steps", 3, "--limit", 4]
    assert palindrome(*command).code == 0
    return command


def test_what_fails_as_python_takes_itself_apart_is_not_the_command_s(run, tmp_path):
    """Threads of Arrow's have ended processes so, after a run was found to be well: apache/arrow#34314."""
    script = """
import os, sys
from palindrome.jobs.__main__ import main

class Late:
    def __del__(self, abort=os.abort):
        abort()

sys.late = Late()
sys.argv[1:] = ["verify", sys.argv[1]]
sys.exit(main())
"""
    command = [sys.executable, "-c", script, str(run[run.index("--out") + 1])]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert "all well" in said.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", 4], "--steps was 3, now 4"),
        (["--ladder", "linear"], "--ladder was logsnr, now linear"),
        (["--limit", 5], "--limit was 4, now 5"),
        (["--shard-size", 7], "--shard-size was 1024, now 7"),
        (["--dtype", "float16"], "--dtype was float32, now float16"),
        (["--max-pixels", 99], "--max-pixels was 100000000, now 99"),
        (["--measure"], "--measure was False, now True"),
    ],
)
def test_another_command_may_not_go_on_in_the_folder(palindrome, run, times, flags, words):
    before = times(run[6])
    said = palindrome(*run, *flags)
    assert said.code == 2
    assert said.err == f"palindrome encode: error: --out: {run[6]} belongs to another command: {words}\n"
    assert times(run[6]) == before


def test_other_images_may_not_go_on_in_the_folder(palindrome, run, sample):
    said = palindrome(*run, "--images", sample)
    assert said.code == 2
    assert "belongs to another command: --images was " in said.err


def test_another_model_may_not_go_on_in_the_folder(palindrome, run, tiny, tmp_path):
    weights = {name: value * 2 for name, value in tiny.weights.items()}
    other = unet2d.UNet2D(tiny.config, weights, tiny.process)
    unet2d.save(other, str(tmp_path))
    said = palindrome(*run, "--model", tmp_path)
    assert said.code == 2
    assert f"model_digest was {tiny.digest}, now {other.digest}" in said.err


def test_another_job_may_not_go_on_in_the_folder(palindrome, run, sample):
    said = palindrome("train", "--images", sample, "--preset", "tiny", "--out", run[6])
    assert said.code == 2
    assert f"--out: {run[6]} belongs to another command: encode, not train" in said.err


def test_what_does_not_change_the_result_may_change(palindrome, run, model, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    said = palindrome(*run, "--workers", 2, "--batch-size", 3, "--decode", "actor", "--model", moved)
    assert (said.code, said.err) == (0, "")
