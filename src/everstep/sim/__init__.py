"""The real machines in a virtual world: virtual time, a seeded fabric that delays, loses and kills, and checkers.

A seed is a bug report: `python -m everstep.sim --seed 7 --groups 3 --steps 20` runs one schedule and says in a line
what happened. Idea: TigerBeetle's VOPR (safety under faults first, then liveness after they heal) and turmoil.
"""
