"""One LLaMA: specification, weights, tensor parallelism, projections with gated LoRA, paged attention."""
