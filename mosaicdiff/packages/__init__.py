"""Sequential packages: parts of the network, each calibrated with those before it pruned."""
