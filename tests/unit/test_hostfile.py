"""The hostfile and the environment file: what they say, and a sentence for each mistake."""

import pytest

from aclip.errors import ConfigError
from aclip.nodes.hostfile import Host, check_hostfile, environment_for_nodes, read_hostfile


def test_hosts_come_in_the_files_order(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two nodes\n\nnode-2 slots=8\n10.0.0.1   slots=4  # the small one\n")
    assert read_hostfile(str(path)) == [Host("node-2", 8), Host("10.0.0.1", 4)]


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("a slots=2\nb 2\n", ["line 2", "'b 2'", "slots="], id="malformed line"),
        pytest.param("a slots=-1\n", ["line 1", "slots=-1"], id="negative slots"),
        pytest.param("a slots=0\n", ["line 1", "a slots=0"], id="zero slots"),
        pytest.param("a slots=2\nb slots=2\na slots=2\n", ["line 3", "names a"], id="duplicate"),
        pytest.param("# nothing\n", ["names no host"], id="empty"),
    ],
)
def test_mistake_is_one_sentence_with_its_line(tmp_path, text, words):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(str(path))
    assert "\n" not in str(caught.value)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_every_mistake_is_found_beside_the_hosts_that_are_right(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("a slots=0\nb slots=1\nc\nb slots=1\n")
    hosts, problems = check_hostfile(str(path))
    assert hosts == [Host("b", 1)]
    assert len(problems) == 3


def test_missing_hostfile_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none"):
        read_hostfile(str(tmp_path / "none"))


def test_nodes_get_this_shells_variables_and_the_files(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    (home / ".deepspeed_env").write_text("A=home\nB=home\n")
    (here / ".deepspeed_env").write_text('# ours\n\nA=here\nC="with = and space"\n')
    found = environment_for_nodes()
    assert found["NCCL_DEBUG"] == "INFO"
    assert "SECRET_OF_MINE" not in found
    assert (found["A"], found["B"], found["C"]) == ("here", "home", "with = and space")
    (here / ".deepspeed_env").write_text("no value\n")
    with pytest.raises(ConfigError, match=r"line 1 of \.deepspeed_env is 'no value'"):
        environment_for_nodes()
