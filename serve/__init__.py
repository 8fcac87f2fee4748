"""Halftone: one language model at several precisions, compressed while it loads, compared on live traffic."""
