"""The link between a member and its lighthouse: an authenticated WebSocket that carries MessagePack messages.

- `codec` turns messages into frames and back, `auth` is the handshake; both are pure functions of bytes.
- `client` keeps one link to a lighthouse open; `server` accepts many.
- `driver` runs a machine of `core/` on an event loop, with one timer.
"""
