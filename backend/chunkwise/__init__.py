"""ChunkWise: a TGI-compatible LLaMA server that spends each LoRA adapter's rank only where the text is hard."""

__version__ = "0.1.0"
