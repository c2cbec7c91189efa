"""Everstep inside other launchers and frameworks."""
