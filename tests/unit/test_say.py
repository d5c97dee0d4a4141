"""What the user is told, he is told once: by rank 0, before and after the ranks have met."""

import subprocess
import sys

import pytest

from aclip.distributed import say


@pytest.mark.parametrize("rank, said", [(None, "a line\n"), ("0", "a line\n"), ("1", "")])
def test_before_the_ranks_have_met_the_launcher_says_which_one_speaks(
    monkeypatch, capsys, rank, said
):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("a line")
    assert capsys.readouterr().out == said


def test_the_nodes_probe_lists_shards_without_torch():
    """It starts over ssh on every node, and torch takes seconds."""
    code = "import sys, aclip.nodes.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
