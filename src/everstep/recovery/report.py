"""What is known of a fetch, while it goes on and afterwards."""

from dataclasses import dataclass, field


@dataclass
class FetchReport:
    """How it went so far; read it from any thread."""

    total_bytes: int = 0
    done_bytes: int = 0
    prepared_at: float = 0.0  # on time.monotonic(): a manifest is here, it fits, and there is memory for the state
    digest_errors: int = 0  # chunks that arrived damaged, and were fetched again
    differing: int = 0  # chunks that one source had otherwise than the one that counts
    retries: int = 0  # connections that failed and were made again
    bytes_from: dict[str, int] = field(default_factory=dict)
    transport: dict[str, str] = field(default_factory=dict)  # "memory" where it was not HTTP
    lost: dict[str, str] = field(default_factory=dict)  # sources, and why they serve no more
