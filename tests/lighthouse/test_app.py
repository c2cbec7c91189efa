"""The whole lighthouse on its port, with the real machines behind it."""

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.core.messages import Drain, Goodbye, Notice, Refused, Switch, Welcome
from everstep.core.types import RefusalCode
from everstep.errors import ConfigError, LighthouseRefused
from everstep.lighthouse.app import Lighthouse
from tests.link.parties import TOKEN, Member, Party, Seen, hello


@contextlib.contextmanager
def lighthouse(**settings: object) -> Iterator[Lighthouse]:
    with Lighthouse.in_thread(LighthouseSettings(**{"port": 0, **settings})) as running:  # type: ignore[arg-type]
        yield running


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10.0) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def expect(party: Party, kind: type) -> Seen:
    return party.events.expect("message", lambda seen: isinstance(seen.value, kind))


def test_a_member_is_welcomed_and_shown_in_the_status_of_its_job() -> None:
    with lighthouse() as running, Party(running.url, job_id="job") as party:
        party.events.expect("open")
        party.client.send(hello("a"))
        welcome = expect(party, Welcome).value
        assert (welcome.member.replica_id, welcome.heartbeat_timeout_s) == ("a", 2.0)
        code, text = get(running.url + "/api/v1/status")
        status = json.loads(text)
        assert code == 200
        assert status["jobs"]["job"]["members"][0]["replica_id"] == "a"
        assert status["jobs"]["job"]["links"] == 1
        assert get(running.url + "/healthz") == (200, "ok\n")


def test_two_jobs_with_the_same_replica_ids_do_not_meet() -> None:
    with lighthouse() as running:
        with Member(running.url, "a", job_id="one") as one, Member(running.url, "a", job_id="two") as two:
            switches = [expect(party, Switch).value for party in (one, two)]
            assert [str(member.replica.member) for member in (one, two)] == ["a#1", "a#1"]
            assert switches[0].founding.history != switches[1].founding.history
            assert one.replica.lighthouse != two.replica.lighthouse
            one.client.close(Goodbye("done"))
            status = json.loads(get(running.url + "/api/v1/status")[1])["jobs"]
            assert (status["two"]["links"], status["two"]["round"], status["two"]["failures"]) == (1, None, 0)
            assert two.client.is_open


def test_a_lighthouse_that_comes_back_on_its_port_and_directory_is_the_same_one(tmp_path: Path) -> None:
    with lighthouse(state_dir=tmp_path) as first:
        port = int(first.address.rpartition(":")[2])
        party = Party(first.url)
        with party:
            party.events.expect("open")
            party.client.send(hello("a"))
            before = expect(party, Welcome).value
    party = Party(f"http://127.0.0.1:{port}")
    with party:
        with lighthouse(state_dir=tmp_path, port=port):
            party.events.expect("open")
            party.client.send(hello("a"))
            after = expect(party, Welcome).value
            assert after.lighthouse == before.lighthouse
            assert after.member.incarnation > before.member.incarnation
        party.events.expect("close")
        with lighthouse(state_dir=tmp_path, port=port):
            party.events.expect("open")
    with lighthouse(port=port), Party(f"http://127.0.0.1:{port}") as other:
        other.events.expect("open")
        other.client.send(hello("a"))
        assert expect(other, Welcome).value.lighthouse != before.lighthouse


def test_a_refusal_of_the_machine_arrives_before_the_link_closes() -> None:
    with lighthouse() as running, Party(running.url) as party:
        party.events.expect("open")
        party.client.send(hello("x" * 500))
        refused = expect(party, Refused).value
        assert refused.code is RefusalCode.BAD_CONFIG
        party.events.expect("close")


def test_a_word_before_hello_closes_the_link_and_no_other() -> None:
    with lighthouse() as running, Party(running.url) as good, Party(running.url) as bad:
        good.events.expect("open")
        bad.events.expect("open")
        bad.client.send(Drain())
        assert "before Hello" in bad.events.expect("close").value
        good.client.send(hello("a"))
        expect(good, Welcome)


def test_a_second_process_with_the_same_replica_id_is_refused_while_the_first_lives() -> None:
    with lighthouse(heartbeat_timeout_s=0.2) as running, Member(running.url, "a") as first:
        expect(first, Switch)
        with Member(running.url, "a") as second:
            refused = expect(second, Refused).value
            assert refused.code is RefusalCode.REPLICA_ID_TAKEN
            assert second.replica.refusal == refused
        assert first.client.is_open


def test_a_killed_groups_death_reaches_the_others_as_a_notice() -> None:
    with lighthouse() as running:
        with Member(running.url, "a", expected_replicas=2) as survivor:
            with Member(running.url, "b", expected_replicas=2) as victim:
                expect(victim, Switch)
                expect(survivor, Switch)
            closed_at = time.monotonic()  # without a Goodbye
            notice = expect(survivor, Notice)
            assert [member.replica_id for member in notice.value.victims] == ["b"]
            assert notice.at - closed_at < 1.0


def test_only_the_named_jobs_are_served_and_only_so_many() -> None:
    with lighthouse(jobs=("mine",)) as running, Party(running.url, job_id="yours") as party:
        error = party.events.expect("failed").value
        assert isinstance(error, LighthouseRefused)
        assert error.code is RefusalCode.WRONG_JOB
        assert "only mine" in str(error)
    with lighthouse(jobs_max=1) as running, Party(running.url, job_id="one") as one:
        one.events.expect("open")
        with Party(running.url, job_id="two", connect_timeout_s=0.2) as two:
            assert "its limit" in str(two.events.expect("failed").value)


def test_with_a_token_the_status_wants_it_and_health_does_not() -> None:
    with lighthouse(token=TOKEN) as running:
        url = running.url + "/api/v1/status"
        assert get(url)[0] == 401
        assert get(url, {"Authorization": "Bearer wrong"})[0] == 401
        code, text = get(url, {"Authorization": f"Bearer {TOKEN.decode()}"})
        assert code == 200
        assert TOKEN.decode() not in text
        assert get(running.url + "/healthz")[0] == 200
        with Party(running.url, token=TOKEN) as party:
            party.events.expect("open")


def test_a_taken_port_and_a_taken_directory_are_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127\\.0\\.0\\.1 is in use: choose another with --port"):
            with lighthouse(port=port, state_dir=tmp_path):
                pass
    with lighthouse(state_dir=tmp_path), pytest.raises(ConfigError, match="in use by another lighthouse"):
        with lighthouse(state_dir=tmp_path):
            pass
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        with lighthouse(bind="203.0.113.1", token=TOKEN):
            pass


def test_a_damaged_journal_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "job-x.journal").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="no journal"):
        with lighthouse(state_dir=tmp_path):
            pass
    with contextlib.ExitStack() as stack:
        (tmp_path / "job-x.journal").unlink()
        stack.enter_context(lighthouse(state_dir=tmp_path))


def test_it_serves_as_an_async_context_manager_in_a_loop_of_the_users() -> None:
    async def main() -> str:
        async with Lighthouse(LighthouseSettings(port=0)) as running:
            reader, writer = await asyncio.open_connection(*running.address.split(":"))
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
            return answer

    assert asyncio.run(main()).endswith("ok\n")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True, timeout=30.0)
    return cert, key


def test_a_link_over_tls_wants_a_trusted_certificate(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with lighthouse(tls_cert=cert, tls_key=key) as running:
        assert running.url.startswith("https://")
        with Party(running.url, tls_ca=cert) as party:
            party.events.expect("open")
            party.client.send(hello("a"))
            expect(party, Welcome)
        with Party(running.url, connect_timeout_s=0.2) as party:
            assert "certificate" in str(party.events.expect("failed").value)
        with urllib.request.urlopen(
            running.url + "/healthz", timeout=10.0, context=ssl.create_default_context(cafile=str(cert))
        ) as response:
            assert response.read() == b"ok\n"


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    (tmp_path / "cert").write_text("no PEM")
    with pytest.raises(ConfigError, match="no usable pair of PEM files"):
        with lighthouse(tls_cert=tmp_path / "cert", tls_key=tmp_path / "cert"):
            pass
    with Party("https://127.0.0.1:1", tls_ca=tmp_path / "cert") as party:
        assert "no readable file of PEM" in str(party.events.expect("failed").value)
