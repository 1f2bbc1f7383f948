"""The network, built by transformers, with one decoder block in memory at a time."""
