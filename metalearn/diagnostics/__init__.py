"""Diagnostics of a meta-gradient."""
