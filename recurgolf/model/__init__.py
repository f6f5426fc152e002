"""The network: one transformer whose parts (block, mixer, MLP, skips, embedding) are options."""
