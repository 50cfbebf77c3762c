"""Pictures and captions of anybody's, from folders, shards and saved datasets."""
