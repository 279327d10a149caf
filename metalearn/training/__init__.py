"""The outer loop, and the ways an outer step unrolls its inner loops."""
