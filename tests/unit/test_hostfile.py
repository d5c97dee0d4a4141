"""The hostfile and the environment file: what they say, and a sentence for each mistake."""

import socket

import pytest

from aclip.errors import ConfigError
from aclip.nodes.hostfile import (
    Host,
    check_hostfile,
    environment_for_nodes,
    is_this_machine,
    read_hostfile,
)
from aclip.nodes.remote_shell import SSH, is_here


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
        pytest.param("a slots=2\nA slots=2\n", ["line 2", "names A"], id="upper case"),
        pytest.param("a slots=2\nme@a slots=2\n", ["line 2", "names me@a"], id="two users"),
        pytest.param("# nothing\n", ["names no host"], id="empty"),
        pytest.param("a\n", ["line 1", "'a'", "NAME slots=GPUS"], id="no slots"),
        pytest.param("a slots=9000\n", ["line 1", "slots=9000"], id="too many slots"),
        pytest.param("node-1:4\n", ["line 1", "write it as node-1 slots=4"], id="MPICH"),
        pytest.param(
            "a slots=4 max_slots=8\n", ["line 1", "write a slots=4"], id="Open MPI, slots first"
        ),
        pytest.param("node[01-04] slots=8\n", ["line 1", "scontrol show hostnames"], id="Slurm"),
        pytest.param("[fe80::1] slots=8\n", ["line 1", "without brackets"], id="IPv6 in brackets"),
        pytest.param("a:22 slots=8\n", ["line 1", "holds a port"], id="port"),
        pytest.param("-oProxyCommand=x slots=8\n", ["line 1", "not the name"], id="option of ssh"),
        pytest.param("a,b slots=8\n", ["line 1", "a,b, which is not"], id="two names"),
        pytest.param(
            "localhost slots=1\nb slots=1\n",
            ["line 1", "localhost beside"],
            id="localhost and more",
        ),
        pytest.param(
            "b slots=1\n127.0.0.1 slots=1\n", ["line 2", "127.0.0.1 beside"], id="loopback and more"
        ),
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


@pytest.mark.parametrize(
    "content, hosts",
    [
        pytest.param(b"\xef\xbb\xbfnode-1 slots=8\n", [Host("node-1", 8)], id="byte order mark"),
        pytest.param(b"a slots=1\r\n\r\nb slots=2\r\n", [Host("a", 1), Host("b", 2)], id="CRLF"),
        pytest.param(b"a\tslots = 4 # x\n", [Host("a", 4)], id="tab and spaces"),
        pytest.param(
            b"me@a slots=4\nfd00::7 slots=4", [Host("me@a", 4), Host("fd00::7", 4)], id="IPv6"
        ),
    ],
)
def test_other_spellings_are_read(tmp_path, content, hosts):
    path = tmp_path / "hostfile"
    path.write_bytes(content)
    assert read_hostfile(str(path)) == hosts


def test_user_is_no_part_of_the_address_that_other_nodes_reach():
    assert Host("me@node-1", 8).address == "node-1"
    assert Host("fd00::7", 8).address == "fd00::7"


@pytest.fixture
def named(monkeypatch):
    """named(host, domain): what this machine is called."""

    def name(host: str, domain: str) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        monkeypatch.setattr(socket, "getfqdn", lambda: domain)

    return name


@pytest.mark.parametrize(
    "name",
    ["localhost", "LOCALHOST", "127.0.0.1", "127.0.1.1", "::1", "Node-7", "node-7.cluster.local"],
)
def test_this_machine_alone_is_localhost_whatever_it_is_called(named, tmp_path, name):
    named("node-7", "node-7.cluster.local")
    path = tmp_path / "hostfile"
    path.write_text(f"{name} slots=2\n")
    assert read_hostfile(str(path)) == [Host("localhost", 2)]


def test_other_machines_are_not_this_one(named, tmp_path):
    named("node-7.cluster.local", "node-7.cluster.local")
    assert is_this_machine("node-7")
    for name in ("node-71", "node-7.elsewhere.org", "192.0.2.1", "2001:db8::1"):
        assert not is_this_machine(name)
    path = tmp_path / "hostfile"
    path.write_text("node-7 slots=2\nnode-8 slots=2\n")
    assert read_hostfile(str(path)) == [Host("node-7", 2), Host("node-8", 2)]


def test_own_name_needs_no_ssh_but_another_remote_shell_is_used_as_asked(named):
    named("node-7", "node-7")
    assert is_here(SSH, "node-7") and not is_here(SSH, "node-8")
    assert not is_here(SSH, "me@node-7")  # another user there
    assert not is_here("srun -w {host}", "node-7")
    assert is_here("srun -w {host}", "localhost")


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
    (here / ".deepspeed_env").write_bytes(b"\xef\xbb\xbfA=mark\r\nexport B=shell\r\n")
    found = environment_for_nodes()
    assert (found["A"], found["B"]) == ("mark", "shell")
    (here / ".deepspeed_env").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match=r"^\.deepspeed_env can't be read"):
        environment_for_nodes()
    (here / ".deepspeed_env").write_text("no value\n")
    with pytest.raises(ConfigError, match=r"line 1 of \.deepspeed_env is 'no value'"):
        environment_for_nodes()
