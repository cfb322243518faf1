"""The shard process: executes what it is told on one rank of the model. It takes no steering decision of its own."""
