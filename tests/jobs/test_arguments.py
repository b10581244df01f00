"""Command lines made from dataclasses: the help's groups and examples, suggestions for what is misspelt."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

import pytest

from palindrome.jobs.arguments import GROUPS, ConfigError, Options, add_arguments, from_arguments
from palindrome.jobs.command import JOBS, parse
from palindrome.jobs.submit import SubmitConfig


def config_of(job):
    return getattr(importlib.import_module(f"palindrome.jobs.{job}"), f"{job.capitalize()}Config")


def examples(job):
    lines = config_of(job).EXAMPLES.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def refused(capsys):
    """refused("encode", ...) -> the one line on standard error with which the command is refused."""

    def refused(*argv):
        with pytest.raises(SystemExit) as end:
            parse(argv)
        said = capsys.readouterr()
        assert (end.value.code, said.out) == (2, "")
        assert said.err.endswith("\n") and said.err.count("\n") == 1
        return said.err.removesuffix("\n")

    return refused


@pytest.fixture
def help_of(capsys):
    def help_of(*argv):
        with pytest.raises(SystemExit) as end:
            parse([*argv, "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    return help_of


@pytest.mark.parametrize("job", JOBS)
def test_every_command_has_examples_and_each_parses(job):
    assert any(words[:2] == ["palindrome", job] for words in examples(job))
    for words in examples(job):
        assert words[0] == "palindrome"
        command = parse(words[1:])
        assert command.job == words[1]
        if isinstance(command.config, SubmitConfig):
            parse(command.config.command)


@pytest.mark.parametrize("job", JOBS)
def test_the_help_ends_with_the_examples(help_of, job):
    shown = help_of(job).partition("\nexamples:\n")[2].replace("\\\n", " ")
    assert [shlex.split(line) for line in shown.splitlines()] == examples(job)


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_is_in_a_group_and_the_groups_are_in_order(help_of, job):
    said = help_of(job).partition("\nexamples:\n")[0]
    titles = re.findall(r"^([a-z ]+):$", said, re.MULTILINE)
    assert titles == ["options", *(title for title in GROUPS if title in titles)]
    alone = said.partition("\noptions:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (-\S+)", alone, re.MULTILINE) == ["-h,"]


def test_groups_of_encode(help_of):
    said = help_of("encode").partition("\nexamples:\n")[0]
    groups = {title: re.findall(r"^  (--[a-z-]+)", body, re.MULTILINE) for title, body in sections(said)}
    assert groups["required"] == ["--images", "--model", "--out"]
    assert {"--format", "--limit", "--fit"} <= set(groups["input"])
    assert groups["inversion"] == ["--steps", "--corrections", "--tolerance", "--ladder"]
    told = {
        "--class",
        "--class-column",
        "--prompt",
        "--prompt-column",
        "--guidance",
        "--null-class",
        "--negative-prompt",
    }
    latent = {"--size", "--vae-tile", "--decode-inversion"}
    assert set(groups["model"]) == {"--precision", "--compile", "--allow-pickle", *told, *latent}
    assert {"--address", "--workers", "--batch-size"} <= set(groups["cluster"])
    assert groups["storage and logging"] == ["--storage-options", "--log"]
    assert said.startswith("usage: palindrome encode --images IMAGES --model MODEL --out OUT [options]\n")


def sections(said):
    return re.findall(r"^([a-z ]+):\n((?:  .*\n)+)", said + "\n", re.MULTILINE)


def test_flags_of_one_name_are_in_the_group_of_their_class(help_of):
    for job, group in (("encode", "input"), ("generate", "output")):
        found = {title for title, body in sections(help_of(job)) if "--format" in body and title != "examples"}
        assert found == {group}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["encod"], "palindrome: error: no command 'encod'; did you mean 'encode'?"),
        (["encod", "--images", "x"], "palindrome: error: no command 'encod'; did you mean 'encode'?"),
        (["qqq"], f"palindrome: error: no command 'qqq'; choose from {', '.join(JOBS)}"),
        (["a\nb"], f"palindrome: error: no command 'a\\nb'; choose from {', '.join(JOBS)}"),
        (["--verison"], "palindrome: error: unrecognized arguments: --verison; did you mean --version?"),
    ],
)
def test_a_misspelt_command(refused, argv, message):
    assert refused(*argv) == message


ENCODE = ["encode", "--images", "x", "--model", "y"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["encode", "--imagse", "x"], ": --imagse; did you mean --images?"),
        (["encode", "--imagse=x"], ": --imagse; did you mean --images?"),
        (["encode", "--imagse", "x", "--modle", "y"], ": --imagse --modle; did you mean --images, --model?"),
        ([*ENCODE, "--storage", "s3"], "; did you mean --storage-options?"),
        ([*ENCODE, "--no-relits"], ": --no-relits; did you mean --no-relist?"),
        ([*ENCODE, "--zzz"], ": --zzz"),
        ([*ENCODE, "one", "two\x1b"], ": one two\\x1b"),
        (["status", "run", "--jsno"], ": --jsno; did you mean --json?"),
        (["submit", "--shp", "x", "--", "encode"], ": --shp; did you mean --ship?"),
    ],
)
def test_a_misspelt_flag(refused, argv, words):
    assert refused(*argv) == f"palindrome: error: unrecognized arguments{words}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--storage-options", "{s3:", "{secret:", "--hush}}"], ""),
        (["--storage-options", "{s3:", "hush}}"], ""),
        (["--storage-options", "x", "--images=hush", "--imagse=hush"], ""),
        (["--storage-options", "x", "--oot", "hush"], "; did you mean --out?"),
        (["--storage-option", '{"s3": {"secret": "hush"}}'], "; did you mean --storage-options?"),
        (['--storage-option={"s3": {"secret": "hush"}}'], "; did you mean --storage-options?"),
        (["--storage-option", "{s3:", "{secret:", "--hush}}"], "; did you mean --storage-options?"),
        (["--fsspec", '{"s3": {"secret": "hush"}}'], ": --fsspec"),
        (['--fsspec={"s3": {"secret": "hush"}}'], ": --fsspec"),
    ],
)
def test_what_may_hold_a_secret_is_not_repeated(refused, argv, words):
    assert refused(*ENCODE, *argv) == f"palindrome: error: unrecognized arguments{words}"


def test_required_flags_are_named_together(refused):
    assert refused("encode", "--model", "x") == (
        "palindrome encode: error: the following arguments are required: --out, --images"
    )


def test_a_switch_s_twin_is_hidden_but_accepted(help_of):
    said = help_of("encode")
    assert "--dry-run" in said and "--measure" in said and "--calibrate" in said
    assert re.findall(r"--no-[a-z-]+", said) == ["--no-relist"]
    argv = [*ENCODE, "--out", "z"]
    assert parse([*argv, "--measure"]).config.measure
    assert not parse([*argv, "--measure", "--no-measure"]).config.measure
    assert not parse([*argv, "--no-relist"]).config.relist
    assert parse(argv).config.relist


def test_the_version_imports_neither_torch_nor_ray():
    script = (
        "import sys\nfrom palindrome.jobs.__main__ import main\n"
        "try:\n    main(['--version'])\n"
        "except SystemExit as e:\n    print(e.code, {'torch', 'ray'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    python = ".".join(map(str, sys.version_info[:3]))
    assert run.stdout == (
        f"palindrome {version('palindrome')} (python {python}, ray {version('ray')}, torch {version('torch')})\n"
        "0 set()\n"
    )


@dataclass(frozen=True, kw_only=True)
class Sampled(Options):
    """Options without a group."""

    kind: str
    """A kind, 100 % of it."""
    many: tuple[int, ...] = (1, 2)
    """Numbers."""
    zero: float = 0.0
    """A number."""
    switch: bool = False
    """A switch."""


def test_options_without_a_group_are_among_the_parser_s_own():
    parser = argparse.ArgumentParser(prog="x")
    assert add_arguments(parser, Sampled) == ["--kind", "--many", "--zero", "--switch"]
    text = " ".join(parser.format_help().split())
    assert "required: --kind KIND A kind, 100 % of it." in text
    assert "options: -h, --help show this help message and exit --many INT [INT ...] Numbers. (default: 1 2)" in text
    assert "--zero FLOAT A number. (default: 0.0) --switch A switch. required:" in text
    assert from_arguments(Sampled, parser.parse_args(["--kind", "a", "--many", "3"])) == Sampled(kind="a", many=(3,))
    with pytest.raises(ConfigError, match="required: --kind"):
        from_arguments(Sampled, parser.parse_args([]))
