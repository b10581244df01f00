"""One file per job: a config dataclass and run(config). No job imports another."""
