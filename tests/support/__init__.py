"""What the tests stand on: waiting, real processes, leak checks, the architecture rules. No mocks."""
