"""`everstep demo`: a small GPT in three replica groups, one of which is killed and comes back."""
