"""The work of each job on one shard. Imports runtime and the rooms below."""
