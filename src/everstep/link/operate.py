"""What an operator asks of a lighthouse over HTTP."""

import asyncio
from urllib.parse import urlencode

import aiohttp

from everstep.core.types import RefusalCode
from everstep.errors import ConfigError, LighthouseRefused, LighthouseUnreachable
from everstep.link import auth
from everstep.link.dial import LinkTarget, trust, why


def drain_group(target: LinkTarget, group: str) -> str:
    """Ask that this group leave the target's job at a step boundary; returns the lighthouse's answer.

    Raises ConfigError (no such job or group), LighthouseRefused (token) and LighthouseUnreachable.
    """
    return asyncio.run(_post(target, "/api/v1/drain", {"job": target.credentials.job_id, "group": group}))


async def _post(target: LinkTarget, path: str, query: dict[str, str]) -> str:
    token = target.credentials.token
    headers = {"Authorization": f"Bearer {auth.http_key(token, 'operate')}"} if token is not None else {}
    timeout = aiohttp.ClientTimeout(total=target.connect_timeout_s)
    connector = aiohttp.TCPConnector(ssl=trust(target))
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            async with session.post(f"{target.url}{path}?{urlencode(query)}", headers=headers) as response:
                text = (await response.text()).strip()
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise LighthouseUnreachable(f"no lighthouse at {target.url}: {why(error)}") from error
    if response.status == 401:
        raise LighthouseRefused(RefusalCode.BAD_TOKEN, text)
    if response.status != 200:
        raise ConfigError(text or f"HTTP {response.status}")
    return text
