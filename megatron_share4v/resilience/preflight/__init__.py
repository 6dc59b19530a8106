"""Checks before a launch: consistency across ranks, each node, the whole cluster."""
