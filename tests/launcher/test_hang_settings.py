"""What `everstep run` makes of settings of rank monitoring: on the command line, and in files."""

import signal
from pathlib import Path

import pytest

from everstep.core.limits import HEARTBEAT, OUTSIDE
from everstep.core.policies import RestartPolicyName
from everstep.errors import ConfigError
from everstep.launcher.hang_options import FT_KEYS, FT_OPTIONS
from everstep.launcher.hang_settings import explain_without_effect
from everstep.launcher.option import Fate
from everstep.launcher.options import OPTIONS
from tests.launcher.typed import settings, values

SECTION = """
trainer: {lr: 0.1}
setup:
  - resilience:
      fault_tolerance:
        initial_rank_heartbeat_timeout: 600
        rank-heartbeat-timeout: null
        rank_section_timeouts: {setup: 600, step: 30.5, save: null}
        rank_out_of_section_timeout: 120
        rank_termination_signal: SIGTERM
        safety_factor: 4
        max_no_progress_cycles: 5
        use_infra_group_rank: false
"""


def test_the_same_can_be_said_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ft.yaml"
    path.write_text(SECTION)
    from_file = settings(f"--ft-cfg-path {path} x.py")
    from_line = settings(
        "--ft-initial-rank-heartbeat-timeout 600 --ft-rank_heartbeat_timeout=null --ft-rank-section-timeouts "
        "setup:600,step:30.5,save:null --ft-rank-out-of-section-timeout=120 --ft-rank-termination-signal=15 "
        "--ft-safety-factor 4 --ft-param-max_no_progress_cycles 5 x.py"
    )
    assert from_file.monitor == from_line.monitor
    assert from_file.max_no_progress_cycles == from_line.max_no_progress_cycles == 5
    assert from_file.monitor.hang.initial_s == 600.0
    assert from_file.monitor.termination_signal == signal.SIGTERM
    limits = from_file.monitor.hang.limits
    assert limits.given == {HEARTBEAT: None, OUTSIDE: 120.0, "setup": 600.0, "step": 30.5, "save": None}
    assert limits.safety_factor == 4.0
    assert limits.learns


def test_the_command_line_wins_over_ft_cfg_path_and_that_over_config(tmp_path: Path) -> None:
    ft, config = tmp_path / "ft.yaml", tmp_path / "job.yaml"
    ft.write_text("fault_tolerance: {safety_factor: 2, stopped_timeout: 22}")
    config.write_text("nnodes: 1\nfault_tolerance: {safety_factor: 3, stopped_timeout: 33, kill_after: 44}\n")
    monitor = settings(f"--config {config} --ft-cfg-path {ft} --ft-safety-factor 1.5 x.py").monitor
    assert (monitor.hang.limits.safety_factor, monitor.hang.stopped_s, monitor.kill_after_s) == (1.5, 22.0, 44.0)


def test_nothing_said_limits_nothing_until_it_is_learned() -> None:
    monitor = settings().monitor
    assert monitor.hang.initial_s is None
    assert monitor.hang.limits.given == {}
    assert monitor.hang.limits.learns
    assert monitor.termination_signal == signal.SIGKILL


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--ft-rank-heartbeat-timeout=soon", "a number of seconds, or null"),
        ("--ft-rank-heartbeat-timeout=-1", "a number of seconds, or null"),
        ("--ft-rank-section-timeouts=step", "no new NAME:SECONDS"),
        ("--ft-rank-section-timeouts=step:1,step:2", "no new NAME:SECONDS"),
        ("--ft-rank-termination-signal=SIGNOTHING", "is no signal"),
        ("--ft-rank-termination-signal=SIGSTOP", "does not end a process"),
        ("--ft-safety-factor=0.5", "at least 1"),
        ("--ft-suspect-share=2", "at most 1"),
        ("--ft-timeouts=maybe", "auto or given"),
        ("--ft-log-level=loud", "debug, info"),
        ("--ft-max-no-progress-cycles=x", "a whole number"),
        ("--ft-enable-nic-monitor=true", "not supported: network cards are not monitored"),
        ("--ft-segment=4", "topology"),
        ("--ft-cfg-path=/nonexistent", "cannot be read"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_to_do(line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        settings(f"{line} x.py")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fault_tolerance: {rank_hartbeat_timeout: 3}", "did you mean rank_heartbeat_timeout"),
        ("fault_tolerance: 3", "has no section"),
        ("trainer: {}", "has no section"),
        ("fault_tolerance: {rank_section_timeouts: [1]}", "a list"),
    ],
)
def test_a_wrong_section_is_an_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "ft.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        settings(f"--ft-cfg-path {path} x.py")


def test_what_asks_for_nothing_is_accepted_though_more_would_be_refused() -> None:
    settings("--ft-enable-nic-monitor=False --ft-segment=null x.py")


def test_what_has_no_effect_is_accepted_and_explained() -> None:
    line = "--ft-workload-check-interval 5 --ft-gpu-memory-tolerance-mb=512 --ft-safety-factor 2 x.py"
    told = list(explain_without_effect(values(line)))
    assert [text.partition(" ")[0] for text in told] == ["--ft-workload-check-interval", "--ft-gpu-memory-tolerance-mb"]
    assert all("has no effect here" in text for text in told)


def test_restart_policy_and_infrastructure_ranks_have_the_names_of_both_launchers() -> None:
    assert settings("--ft-restart-policy min-healthy --nnodes 1:2 x.py").restart_policy is RestartPolicyName.MIN_HEALTHY
    both = settings("--ft-restart-policy min-healthy --restart-policy any-failed x.py")
    assert both.restart_policy is RestartPolicyName.ANY_FAILED


def test_an_unknown_flag_is_an_error_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        values("--ft-rank-hartbeat-timeout=3 x.py")
    assert ended.value.code == 2
    assert "did you mean --ft-rank-heartbeat-timeout?" in capsys.readouterr().err


def test_a_scripts_own_arguments_are_not_ours() -> None:
    assert values("x.py --ft-rank-heartbeat-timeout=3").script_args.value == ("--ft-rank-heartbeat-timeout=3",)


# As `ft_launcher --help` of nvidia-resiliency-ext 0.4.1 lists them, in some of their spellings.
FT_LAUNCHER_FLAGS = """
--nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --rdzv-id --rdzv-conf --standalone --max-restarts
--term-timeout --workers-stop-timeout --monitor-interval --start-method --role -m --module --no-python --run-path
--log-dir -r --redirects -t --tee --local-ranks-filter --node-rank --master-addr --master-port --local-addr
--logs-specs --ft-cfg-path --fault-tol-cfg-path --ft-workload-check-interval --ft-initial-rank-heartbeat-timeout
--ft-rank-heartbeat-timeout --ft-node-health-check-interval --ft-safety-factor --ft-rank-termination-signal
--ft-log-level --ft-rank-out-of-section-timeout --ft-rank-section-timeouts --ft-restart-check-interval
--ft-restart-policy --restart-policy --ft-enable-nic-monitor --ft-param-enable-nic-monitor
--ft_param_enable_nic_monitor --ft-pci-topo-file --ft-param-pci-topo-file --ft_param_pci_topo_file
--ft-link-down-path-template --ft-param-link-down-path-template --ft_param_link_down_path_template
--ft-param-safety_factor --ft-param-rank_section_timeouts --ignore-missing-fault-tol-cfg --nproc_per_node
--rdzv_backend --term_timeout --workers_stop_timeout --ft-cfg_path --ft-rank_heartbeat_timeout
"""


def test_every_flag_of_ft_launcher_has_a_fate() -> None:
    ours = {flag for option in OPTIONS for flag in option.flags}
    theirs = FT_LAUNCHER_FLAGS.split()
    assert set(theirs) <= ours


def test_how_long_workers_may_take_to_stop_is_said_as_ft_launcher_says_it() -> None:
    found = settings("--workers-stop-timeout 12.5 --term_timeout=600 x.py")
    assert (found.shutdown_timeout_s, found.drain_timeout_s) == (12.5, 600.0)
    assert settings("--workers-stop-timeout 12.5 --shutdown-timeout 7 x.py").shutdown_timeout_s == 7
    assert (settings().shutdown_timeout_s, settings().drain_timeout_s) == (30, None)
    with pytest.raises(ConfigError, match=r"--term-timeout=-1\.0 must be a number of seconds"):
        settings("--term-timeout -1 x.py")


def test_every_key_has_a_fate_and_a_note_and_flags_of_both_spellings() -> None:
    assert len({key.name for key in FT_KEYS}) == len(FT_KEYS) >= 55
    assert all(key.note for key in FT_KEYS)
    assert {key.fate for key in FT_KEYS} == set(Fate)
    flags = [flag for option in FT_OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert {"--ft-rank-heartbeat-timeout", "--ft-rank_heartbeat_timeout"} <= set(flags)
