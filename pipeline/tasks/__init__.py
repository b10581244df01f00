"""What one shard becomes. Imports runtime and the rooms below."""
