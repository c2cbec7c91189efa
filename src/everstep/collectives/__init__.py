"""Process groups that are rebuilt for each quorum and can be cut off at any moment."""
