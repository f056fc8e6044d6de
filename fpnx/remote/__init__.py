"""Objects at URLs (s3://, gs://, https://): list, read byte ranges, write."""
