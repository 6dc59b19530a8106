"""Data preparation: annotation files and image folders become validated WebDataset shards with an index."""
