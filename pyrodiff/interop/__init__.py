"""Weights of other libraries. Each module here is imported only when asked for."""
