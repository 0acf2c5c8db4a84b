"""Packed weights: ``layout`` is the order of bits, ``checkpoint`` the folder on disk."""
