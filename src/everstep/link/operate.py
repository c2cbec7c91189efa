"""What an operator asks of a lighthouse over HTTP."""

import asyncio
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec

from everstep.core.types import RefusalCode
from everstep.errors import ConfigError, LighthouseRefused, LighthouseUnreachable
from everstep.link import auth
from everstep.link.dial import LinkTarget, trust, why


def drain_group(target: LinkTarget, group: str) -> str:
    """Ask that this group leave the target's job at a step boundary; returns the lighthouse's answer.

    Raises ConfigError (no such job or group), LighthouseRefused (token) and LighthouseUnreachable.
    """
    return _ask(target, "drain", group=group)


def admit_group(target: LinkTarget, group: str) -> str:
    """Let in a group that is held or left out for dying again and again; as `drain_group` otherwise."""
    return _ask(target, "admit", group=group)


def admit_node(target: LinkTarget, node: str) -> str:
    """Let in a node that a script has excluded; as `drain_group` otherwise."""
    return _ask(target, "admit-node", node=node)


def start_new_history(target: LinkTarget) -> str:
    """Give up the state that the members of the target's job hold; as `drain_group` otherwise."""
    return _ask(target, "new-history")


def _ask(target: LinkTarget, request: str, **query: str) -> str:
    path = f"/api/v1/{request}?{urlencode({'job': target.credentials.job_id, **query})}"
    return asyncio.run(_request(target, "POST", path, "operate"))


def job_status(target: LinkTarget) -> dict[str, Any]:
    """The target's job as /api/v1/status shows it. Raises ConfigError (no such job) and what `drain_group` does."""
    status: dict[str, Any] = msgspec.json.decode(asyncio.run(_request(target, "GET", "/api/v1/status", "read")))
    job: dict[str, Any] | None = status["jobs"].get(target.credentials.job_id)
    if job is None:
        known = ", ".join(status["jobs"]) or "none"
        raise ConfigError(f"no job {target.credentials.job_id} at {target.url}; its jobs: {known}")
    return job


async def _request(target: LinkTarget, method: str, path: str, scope: str) -> str:
    token = target.credentials.token
    headers = {"Authorization": f"Bearer {auth.http_key(token, scope)}"} if token is not None else {}
    timeout = aiohttp.ClientTimeout(total=target.connect_timeout_s)
    connector = aiohttp.TCPConnector(ssl=trust(target))
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            async with session.request(method, f"{target.url}{path}", headers=headers) as response:
                text = (await response.text()).strip()
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise LighthouseUnreachable(f"no lighthouse at {target.url}: {why(error)}") from error
    if response.status == 401:
        raise LighthouseRefused(RefusalCode.BAD_TOKEN, text)
    if response.status == 503:
        raise LighthouseUnreachable(text)
    if response.status != 200:
        raise ConfigError(text or f"HTTP {response.status}")
    return text
