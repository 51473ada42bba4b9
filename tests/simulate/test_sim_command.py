"""``ltpctl sim``: a process that serves a fleet, from its first word to its end."""

from __future__ import annotations

import json
import signal
import socket
import stat
from pathlib import Path

import pytest
import yaml

from inventory.ledger import MeasurementRow, VerdictRow, open_ledger
from tests.simulate.running import ltpctl, planted, running

MISBEHAVING = {
    "n1": ("ecc_uncorrectable", "unhealthy", "accelerator.ecc"),
    "n2": ("driver_skew", "degraded", "accelerator.versions"),
    "n3": ("clock_off", "unhealthy", "host.clock"),
    "n4": ("tool_hangs", "unknown", "accelerator.tool_responds"),
    "n5": ("refuse", "unknown", "transport.connect"),
    "n6": ("silent", "unknown", "transport.banner"),
    "n7": ("trickle", "unknown", "transport.banner"),
    "n8": ("wrong_host_key", "unknown", "transport.host_key"),
    "n9": ("auth_refused", "unknown", "transport.auth"),
    "n10": ("hang_after_auth", "unknown", "transport.exec"),
    "n11": ("no_python", "unknown", "agent.start"),
    "n12": ("forced_command", "unknown", "agent.start"),
    "n13": ("drop", "unknown", "transport.command"),
    "n14": ("killed", "unknown", "transport.command"),
    "n15": ("flood", "unknown", "transport.output"),
}
HARMLESS = {"n16": "noise", "n17": "slow_answer"}


def test_a_fleet_with_every_kind_of_trouble_is_validated_and_each_bad_node_is_named(tmp_path: Path) -> None:
    faults = {node: kind for node, (kind, _, _) in MISBEHAVING.items()} | HARMLESS
    with running(tmp_path / "sim", "--nodes", "n[1-24]", *planted(faults)) as fleet:
        assert fleet.told["nodes"] == 24
        assert fleet.told["faulty"] == sorted(faults)
        done = ltpctl("validate", "nodes", "--quick", "--config", fleet.config, "--json", LTP_SSH_BANNER="1")
        end = fleet.end(signal.SIGINT)
        assert fleet.errors.read_text() == "the fleet has ended\n"
    assert done.returncode == 1, done.stderr
    nodes = {node["node"]: node for node in json.loads(done.stdout)["nodes"]}
    assert len(nodes) == 24
    assert {n for n, node in nodes.items() if node["verdict"] != "healthy"} == set(MISBEHAVING)
    for name, (kind, verdict, check) in MISBEHAVING.items():
        assert nodes[name]["verdict"] == verdict, kind
        assert check in {finding["check"] for finding in nodes[name]["findings"]}, kind
    assert (end.status, end.seconds < 20) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_fleet_at_once_also_with_clients_connected(tmp_path: Path, number: int) -> None:
    with running(tmp_path / "sim", "--nodes", "n[1-4]", "--fault", "n4=silent") as fleet:
        address = yaml.safe_load((tmp_path / "sim" / "cluster.yaml").read_text())["nodes"]["n1"]["address"]
        port = fleet.told["port"]
        with (
            socket.create_connection((address, port)) as half_open,
            socket.create_connection(("127.101.0.4", port)) as silent,
        ):
            assert half_open.recv(8) == b"SSH-2.0-"
            end = fleet.end(number)
            half_open.settimeout(5)
            while half_open.recv(4096):
                pass
            silent.settimeout(5)
            assert silent.recv(10) == b""
        assert (end.status, end.seconds < 20) == (0, True)
        assert fleet.errors.read_text() == "the fleet has ended\n"


def test_everything_is_written_below_its_folder_and_the_key_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "sim"
    before = set(tmp_path.iterdir())
    with running(folder, "--nodes", "n[1-2]") as fleet:
        assert fleet.config == str(folder / "config.yaml")
        assert {path.name for path in folder.iterdir()} == {
            ".lock", "config.yaml", "cluster.yaml", "id_ed25519", "known_hosts",
        }  # fmt: skip
        assert stat.S_IMODE((folder / "id_ed25519").stat().st_mode) == 0o600
        assert set(tmp_path.iterdir()) - before == {folder, fleet.errors}
        listed = ltpctl("inventory", "list", "--config", fleet.config, "--json")
        assert listed.returncode == 0, listed.stderr


def test_a_second_start_in_the_same_folder_keeps_the_history_and_replaces_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "sim"
    with running(folder, "--nodes", "n[1-2]") as fleet:
        assert ltpctl("validate", "nodes", "--quick", "--config", fleet.config).returncode == 0
        fleet.end()
    with running(folder, "--nodes", "n[1-3]", "--sku", "mi300x") as fleet:
        assert ltpctl("validate", "nodes", "--quick", "--config", fleet.config).returncode == 0
        runs = json.loads(ltpctl("validate", "runs", "--config", fleet.config, "--json").stdout)["runs"]
    assert len(runs) == 2


def test_a_folder_with_foreign_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: true\n")
    ended = ltpctl("sim", "start", "--dir", str(tmp_path))
    assert ended.returncode == 2
    assert f"{tmp_path}: holds other files; name an empty or a new folder with --dir" in ended.stderr
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"config.yaml": "mine: true\n"}


def test_a_second_fleet_cannot_take_the_folder_of_one_that_runs(tmp_path: Path) -> None:
    with running(tmp_path / "sim", "--nodes", "n1"):
        before = (tmp_path / "sim" / "id_ed25519").read_bytes()
        ended = ltpctl("sim", "start", "--dir", str(tmp_path / "sim"))
        assert ended.returncode == 2
        assert "another simulated fleet uses this folder" in ended.stderr
        assert (tmp_path / "sim" / "id_ed25519").read_bytes() == before


def test_two_fleets_run_beside_each_other_on_ports_of_their_own(tmp_path: Path) -> None:
    with running(tmp_path / "a", "--nodes", "n[1-3]") as a, running(tmp_path / "b", "--nodes", "n[1-3]") as b:
        assert a.told["port"] != b.told["port"]
        for fleet in (a, b):
            assert ltpctl("validate", "nodes", "--quick", "--config", fleet.config).returncode == 0


def test_a_port_that_is_taken_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.101.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = ltpctl("sim", "start", "--nodes", "n[1-3]", "--port", str(port), "--dir", str(tmp_path / "s"))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        f"ltpctl: cannot listen on 127.101.0.2:{port}: Address already in use; choose another with --port"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fault", "n3=ecc"], "there is no fault 'ecc'"),
        (["--fault", "n3=ecc_uncorectable"], "did you mean ecc_uncorrectable"),
        (["--fault", "n99=refuse"], "n99 is not one of n[1-4]"),
        (["--fault", "refuse"], "expected SET=KIND, such as node017=ecc_uncorrectable"),
        (["--fault", "n1=refuse", "--fault", "n1=silent"], "n1 has the fault refuse already"),
        (["--sku", "h1000"], "no profile describes the SKU 'h1000'; did you mean"),
        (["--sku", "generic-cpu", "--fault", "n1=link_down"], "changes nothing on nodes of SKU generic-cpu"),
        (["--nodes", "n[1-70000]"], "at most 65000 have addresses"),
        (["--nodes", "n[1-"], "n[1-"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    nodes = [] if "--nodes" in arguments else ["--nodes", "n[1-4]"]
    ended = ltpctl("sim", "start", *nodes, "--dir", str(tmp_path / "sim"), *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_more_nodes_than_this_process_may_open_files_for_is_said_before_anything_is_bound(
    tmp_path: Path,
) -> None:
    import resource
    import subprocess

    from tests.simulate.running import LTPCTL

    ended = subprocess.run(
        [LTPCTL, "sim", "start", "--nodes", "n[1-1000]", "--dir", str(tmp_path / "sim")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500)),
    )
    assert ended.returncode == 2
    assert "1000 nodes need at least 1256 open files, this process may have 500" in ended.stderr


def test_a_low_soft_limit_on_open_files_is_raised(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with running(tmp_path / "sim", "--nodes", "n[1-600]") as fleet:
            assert fleet.told["nodes"] == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_list_of_faults_is_complete_in_both_forms() -> None:
    from probes.simulate.scenario import fault_kinds

    told = json.loads(ltpctl("sim", "faults", "--json").stdout)
    assert told["schema"] == "ltpctl/sim-faults/1"
    assert {row["kind"]: row["what"] for row in told["kinds"]} == {
        k: f.what for k, f in fault_kinds().items()
    }
    shown = ltpctl("sim", "faults").stdout
    assert all(kind in shown for kind in fault_kinds())


def test_the_scenarios_that_ship_start_and_show_exactly_what_they_plant(tmp_path: Path) -> None:
    from probes.simulate.scenario import read_scenario

    files = sorted((Path(__file__).resolve().parents[2] / "examples" / "sim").glob("*.yaml"))
    assert files
    for file in files:
        planted_there = set(read_scenario(file).faults)
        with running(tmp_path / file.stem, str(file)) as fleet:
            assert set(fleet.told["faulty"]) == planted_there
            done = ltpctl(
                "validate", "nodes", "--standard", "--config", fleet.config, "--json", LTP_SSH_BANNER="1"
            )
        bad = {n["node"] for n in json.loads(done.stdout)["nodes"] if n["verdict"] != "healthy"}
        assert bad == planted_there, file.name


def test_nodes_without_a_declared_sku_are_held_against_the_history_of_what_they_show_to_be(
    tmp_path: Path,
) -> None:
    metric = "compute.gemm.bf16_tflops"
    with running(tmp_path / "sim", "--nodes", "n[1-2]", "--sku", "h100-sxm") as fleet:
        inventory = tmp_path / "sim" / "cluster.yaml"
        told = yaml.safe_load(inventory.read_text())
        del told["defaults"]["sku"]
        inventory.write_text(yaml.safe_dump(told))
        state = tmp_path / "sim" / "state"
        state.mkdir()
        with open_ledger(state / "ledger.db") as ledger:
            # Nobody's H100 is that fast: every simulated one is slow beside this history.
            past = [f"old{i}" for i in range(8)]
            run = ledger.begin_run("validate", "standard", "test", "old[0-7]")
            ledger.record_verdicts(
                run,
                [VerdictRow(node, "healthy", "h100-sxm") for node in past],
                [MeasurementRow(node, metric, 5000.0 + i, "0") for i, node in enumerate(past)],
            )
            ledger.finish_run(run, {})
        done = ltpctl(
            "validate", "nodes", "--standard", "--check", "compute.gemm", "--config", fleet.config, "--json"
        )
    found = {
        (finding["source"], finding["metric"])
        for node in json.loads(done.stdout)["nodes"]
        for finding in node["findings"]
    }
    assert ("baseline", "bf16_tflops") in found, done.stdout + done.stderr
