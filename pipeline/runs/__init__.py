"""The run folder on disk: kinds, manifest, plan, schemas, shards, summary, status, verify. Never imports Ray."""
