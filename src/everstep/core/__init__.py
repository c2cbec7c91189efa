"""The protocol as pure state machines: no clock, socket, thread, environment or randomness.

Time and identifiers come in as arguments; messages to send come out as return values.
"""
