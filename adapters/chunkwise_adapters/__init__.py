"""LoRA adapters whose rank varies per token: PEFT directories, rank ladders, resident slices, gates and operators.

It knows nothing of models, requests or servers, and never imports ``chunkwise``.
"""
