"""pagenet-bench over RDMA: it runs beside perftest, and prints what it should. Figures are not
judged: the machine is not quiet."""

from __future__ import annotations

import json

import pytest

from pagenet.cli.bench import main


def test_beside_perftest(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "fault",
        "--transport",
        "rdma",
        "--size",
        "2M",
        "--rounds",
        "1",
        "--touches",
        "40",
        "--json",
    ]
    assert main(arguments) == 0
    fields = json.loads(capsys.readouterr().out.splitlines()[-1])["rdma"]
    assert fields["path"] == "rxe0 port 1, gid 1 (10.77.0.1)"
    assert fields["fault_touches"] == 38
    assert fields["first_in_chunk_touches"] == 2
    faults = (
        "fault_p50_us",
        "first_in_chunk_p50_us",
        "ib_read_lat_us",
        "floor_local_us",
        "fault_to_floor",
    )
    for name in (
        *faults,
        "background_gbps",
        "background_allocated_gbps",
        "ib_read_bw_gbps",
        "set_up_s",
    ):
        assert fields[name] > 0, name
    assert set(fields["source_cpu_s"]) == {"rdma", "tcp"}
    assert set(fields["source_cpu_s"]["rdma"]) == {"user", "system"}
