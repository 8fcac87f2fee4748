"""What we compressed, written for other programs to read: GPTQ checkpoints and GGUF files.

Both start from finished parts in our plain layout, so an interrupted export has lost nothing that was compressed.
"""
