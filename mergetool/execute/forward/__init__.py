"""A model that can be run: skeleton and weights by names on disk, block by block, watched where it is wanted."""
