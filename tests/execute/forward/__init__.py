"""Models run whole, block by block and backwards."""
