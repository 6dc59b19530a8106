"""Typed, frozen configuration of runs, models, data sets, engine and server; without torch."""
