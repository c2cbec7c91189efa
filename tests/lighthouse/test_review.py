"""What readers of events may not leave behind at a lighthouse."""

import asyncio

from aiohttp import ClientSession, web

from everstep.core.events import EventKind, JobEvent
from everstep.lighthouse.event_stream import EventStreams


def test_the_log_of_a_dropped_job_goes_when_its_last_reader_goes() -> None:
    served = {"job": {"epoch": 1}}

    async def scenario() -> bool:
        streams = EventStreams(lambda job_id: dict(served[job_id]) if job_id in served else None, 16)
        append = streams.begin("job")
        append(JobEvent(kind=EventKind.JOB_ENDED))
        app = web.Application()
        app.router.add_get("/events", streams.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/events?job=job&after=oldest"
        async with ClientSession() as session, session.get(url) as response:
            while b"job-ended" not in await response.content.readline():
                pass
            del served["job"]
            streams.forget("job")
            streams.close()
            await response.content.read()
        await runner.cleanup()
        return "job" in streams._feeds

    assert not asyncio.run(asyncio.wait_for(scenario(), 20.0))
