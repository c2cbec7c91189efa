"""The lighthouse as a server: one aiohttp app on one port (`app`), a job and its machine (`job`), the journal."""
