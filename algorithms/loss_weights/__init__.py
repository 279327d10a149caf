"""Learned loss weights."""
