"""Ray and the device: scheduler, actor, capacity, precision, progress. Imports runs and the rooms below."""
