"""A folder on any fsspec store, and the S3 client. Imports base."""
