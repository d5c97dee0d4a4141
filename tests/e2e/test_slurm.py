"""slurm.sbatch, with Slurm's commands and multinode.sh stood in for by scripts that say what they
were told."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
SBATCH = Path(__file__).parents[2] / "launch/slurm.sbatch"
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'gpu-07\\ngpu-09\\n'; else echo "$@" >>requeued; fi
"""
MULTINODE = """#!/bin/bash
printf '%s\\n' "$@" >told
trap 'echo saved >>told; exit 143' TERM
touch started
{end}
while :; do sleep 0.1; done
"""


@pytest.fixture
def job(tmp_path):
    """job(end) starts the batch script in a folder where multinode.sh does `end`; job(end, cores)
    in an allocation whose nodes have so many."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    started = []

    def start(end: str, cores: str | None = None) -> subprocess.Popen:
        for name, text in (("bin/scontrol", SCONTROL), ("launch/multinode.sh", MULTINODE)):
            (tmp_path / name).write_text(text.replace("{end}", end))
            (tmp_path / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "gpu-[07,09]",
            "SLURM_GPUS_ON_NODE": "8",
        }
        if cores is not None:
            environment["SLURM_JOB_CPUS_PER_NODE"] = cores
        command = ["bash", str(SBATCH), "--recipe", "aclip_vitl16", "--train", "/data/{0..9}.tar"]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def test_hostfile_is_the_allocation_and_the_arguments_are_passed_on(job, tmp_path):
    assert job("exit 0").wait(30) == 0
    assert (tmp_path / "hostfile-1234567").read_text() == "gpu-07 slots=8\ngpu-09 slots=8\n"
    told = (tmp_path / "told").read_text().splitlines()
    srun = "srun --overlap --nodes=1 --ntasks=1 --nodelist={host}"
    assert told[:5] == ["--master_port", "24567", "--rsh", srun, "hostfile-1234567"]
    assert told[5:] == ["--recipe", "aclip_vitl16", "--train", "/data/{0..9}.tar"]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("cores, step", [("72(x2),36", 36), ("8", 8), ("128(x16)", 128)])
def test_a_step_gets_the_cores_that_every_node_has(job, tmp_path, cores, step):
    assert job("exit 0", cores).wait(30) == 0
    told = (tmp_path / "told").read_text().splitlines()
    assert (
        told[3] == f"srun --overlap --nodes=1 --ntasks=1 --cpus-per-task={step} --nodelist={{host}}"
    )


def test_signal_before_the_end_saves_and_queues_the_job_again(job, tmp_path):
    process = job("")
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)  # to the batch script alone, as --signal=B: does
    assert process.wait(30) == 143
    assert (tmp_path / "told").read_text().splitlines()[-1] == "saved"
    assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"


def test_failure_is_not_queued_again(job, tmp_path):
    assert job("exit 7").wait(30) == 7
    assert not (tmp_path / "requeued").exists()
