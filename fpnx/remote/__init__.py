"""Objects by address: s3://, gs:// and https:// are listed, read by ranges and written."""
