"""Waits for a cluster's nodes, then executes a command:
`python -m palindrome.infra.wait --gpus 1 -- palindrome encode ...`.

A cluster that scales to zero has no GPU when a job starts, and a job without a GPU computes on CPUs. The resources are
also requested from the autoscaler, which keeps them until the cluster ends or another `palindrome.infra.wait` requests
others."""

import argparse
import os
import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

from palindrome.infra.cluster import ClusterError, connect


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m palindrome.infra.wait", description="Wait for a cluster's nodes.")
    parser.add_argument("--nodes", type=int, default=0, help="nodes that must be up, including the head")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be up")
    parser.add_argument("--cpus", type=int, default=0, help="CPUs that must be up")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which to give up (default: 1800)")
    parser.add_argument("command", nargs="*", help="the command to execute then, after --")
    return parser.parse_args(arguments)


def main() -> int:
    wanted = parse()
    missing = _wait(wanted)
    if missing:
        print(f"gave up waiting: {missing}", file=sys.stderr)
        return 1
    if wanted.command:
        os.execvp(wanted.command[0], wanted.command)
    return 0


def _wait(wanted: argparse.Namespace) -> str:
    """What is still missing after the timeout; empty once nothing is."""
    deadline, printed = time.monotonic() + wanted.timeout, ""
    while True:
        try:
            with connect(os.environ.get("RAY_ADDRESS") or "auto"):
                request_resources(bundles=[{"GPU": 1}] * wanted.gpus + [{"CPU": 1}] * wanted.cpus)
                while (missing := _missing(wanted)) and time.monotonic() < deadline:
                    printed = _print_change(missing, printed)
                    time.sleep(0.5)
                return missing
        except ClusterError as e:  # the head is not up yet
            if time.monotonic() > deadline:
                return str(e)
            printed = _print_change(str(e), printed)
            time.sleep(0.5)


def _print_change(missing: str, printed: str) -> str:
    if missing != printed:
        print(f"waiting: {missing}", flush=True)
    return missing


def _missing(wanted: argparse.Namespace) -> str:
    total = ray.cluster_resources()
    up = {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "gpus": int(total.get("GPU", 0)),
        "cpus": int(total.get("CPU", 0)),
    }
    short = [f"{up[name]} of {getattr(wanted, name)} {name}" for name in up if up[name] < getattr(wanted, name)]
    return f"{', '.join(short)} up" if short else ""


if __name__ == "__main__":
    sys.exit(main())
