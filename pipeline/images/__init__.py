"""URI -> pixels or a reject. Imports base and storage."""
