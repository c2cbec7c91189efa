"""The tests; folders mirror src/everstep."""
