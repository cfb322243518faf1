"""The router process: HTTP in front, continuous batching and steering behind, shards over gRPC. Never loads torch."""
