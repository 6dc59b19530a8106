"""Keeping long runs alive: heartbeats, hang diagnosis, shutdown, restarts, stragglers, replica checks."""
