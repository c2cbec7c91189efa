"""The launcher: starts, watches and restarts the workers of a job. Nothing here but `template` imports torch."""
