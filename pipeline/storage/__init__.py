"""A folder on any store fsspec knows, and S3. Imports base."""
