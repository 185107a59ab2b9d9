"""Where results are stored: a folder, or a bucket of R2 or any S3."""
