"""The paged KV cache: who holds which page (`pages`), how a page is stored (`formats`), and the tensors (`cache`)."""
