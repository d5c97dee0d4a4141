"""Rank 0 alone looks at the run folder; the others hear what it found, before there is a group."""

import multiprocessing
import os
import socket
import time

import pytest
import torch.distributed as dist
from small_recipe import SMALL_RECIPE

from aclip.cli import EXIT_BAD_INPUT, EXIT_NOT_SAVED, run_reporting_errors
from aclip.config.recipe_file import load_recipe
from aclip.distributed import decided_by_rank_0
from aclip.errors import ConfigError, NotWritten, PortInUse
from aclip.training.start import check_shared

pytestmark = pytest.mark.distributed
LIMIT = 30.0


def run_ranks(function, num_ranks=2):
    """Runs it on ranks that have not met, and returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(address, RANK=str(number), WORLD_SIZE=str(num_ranks))
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        run_reporting_errors(lambda: function(number))

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=[number]) for number in range(num_ranks)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(LIMIT)
        each.kill()
    return [each.exitcode for each in ranks]


def test_every_rank_gets_what_rank_0_found_and_they_meet_at_the_same_port():
    def train(number):
        found = decided_by_rank_0(lambda: {"checkpoint": f"of rank {number}"}, "a")
        assert found == {"checkpoint": "of rank 0"}
        assert decided_by_rank_0(lambda: number, "b") == 0
        dist.init_process_group("gloo")
        every = [None] * 3
        dist.all_gather_object(every, number)
        assert every == [0, 1, 2]
        assert decided_by_rank_0(lambda: number, "c") == 0
        dist.barrier()

    assert run_ranks(train, 3) == [0, 0, 0]


class OfRank0(ConfigError):
    """A kind that the other ranks do not know."""


@pytest.mark.parametrize("kind, status", [(ConfigError, 2), (OfRank0, 2), (NotWritten, 5)])
def test_every_rank_ends_with_rank_0s_sentence_and_status(kind, status, capfd):
    assert (EXIT_BAD_INPUT, EXIT_NOT_SAVED) == (2, 5)

    def refuse(number):
        def decide():
            raise kind("--output is in use")

        decided_by_rank_0(decide, "a")

    assert run_ranks(refuse) == [status, status]
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == [f"[rank {number}] error: --output is in use" for number in range(2)]


def test_rank_that_waits_for_a_rank_0_that_is_gone_ends_too():
    def die(number):
        decided_by_rank_0(lambda: 0, "a")
        if number == 0:
            time.sleep(0.5)  # until the other one has heard and asks again
            os._exit(7)
        with pytest.raises(ConfigError, match="rank 0 can't be asked"):
            decided_by_rank_0(lambda: 0, "b")

    assert run_ranks(die) == [7, 0]


def test_folder_that_a_rank_does_not_share_is_refused_where_scores_are_kept_in_it(tmp_path):
    recipe = load_recipe(SMALL_RECIPE, ["teacher.reuse=4", "loss.simclr=0", "loss.byol=0"])
    all_looked = multiprocessing.get_context("fork").Barrier(4)
    found = {2: "can't be read: No such file or directory", 3: "holds another word"}

    def check(number):
        folder = tmp_path / (f"disk-{number}" if number in found else "shared")
        folder.mkdir(exist_ok=True)
        if number == 3:
            (folder / ".shared").write_text("of an earlier start")
        said = None
        try:
            check_shared(folder, recipe)
        except ConfigError as error:
            said = str(error)
        all_looked.wait(LIMIT)
        expected = None
        if number in found:
            expected = (
                f"--output is {folder}, which rank {number} on {socket.gethostname()} does not "
                f"share with rank 0 (its .shared {found[number]}), but teacher.reuse is 4, for "
                "which all ranks keep scores there; give a folder that all nodes share, or set "
                "teacher.reuse to 1"
            )
        assert said == expected

    assert run_ranks(check, 4) == [0] * 4


def test_port_that_another_run_holds_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PortInUse, match=f"MASTER_PORT is {port}, which another process"):
            decided_by_rank_0(lambda: 0, "a")
