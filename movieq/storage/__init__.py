"""Storage of results: in a folder, or in a bucket of R2 or any other S3 server."""
