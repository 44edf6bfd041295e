"""Raw data from S3: listed, fetched once, verified."""
