"""Tests of the rank monitor."""
